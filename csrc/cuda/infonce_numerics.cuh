// Units and ranges of the numbers in InfoNCE.
#pragma once

#include "../portable.h"

namespace pxc::cuda {

constexpr float kLog2E = 1.442695040888963407f;
constexpr float kLn2 = 0.693147180559945309f;

// A shift that lags behind the maximum by up to this much spares most tiles the rescaling of the output.
constexpr float kSlack = 8.f;

__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}

}  // namespace pxc::cuda
