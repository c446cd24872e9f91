// Units and ranges of the numbers in InfoNCE.
#pragma once

#include <type_traits>

#include "../portable.h"

namespace pxc::cuda {

constexpr float kLog2E = 1.442695040888963407f;
constexpr float kLn2 = 0.693147180559945309f;

// A shift that lags behind the maximum by up to this much spares most tiles the rescaling of the output.
constexpr float kSlack = 8.f;

// Weights and planes of fp16 are at most 2^kHalfExponent.
constexpr int kHalfExponent = 15;

// Of an element type's arithmetic, a Math or a Tile.

// fp16 weights of pass 1 times 2^kWeightBias: the largest is 2^15 with the slack, and few fall among the
// subnormals.
template <class Math>
constexpr float kWeightBias = std::is_same_v<typename Math::Element, Half> ? kHalfExponent - kSlack : 0.f;
// Likewise of sigma, which is 1 at most, and small where an anchor's class has been learnt.
template <class Math>
constexpr int kSigmaBias = std::is_same_v<typename Math::Element, Half> ? kHalfExponent : 0;

// bf16 weights err by 2e-3 each, which is much where they are all alike, as sigma of a class is, and in
// the gradient of a key, which few anchors make up. Only the pass over the negatives takes bf16's whole.
template <class Math>
constexpr int kWeightParts = Math::kPlanes == 2 || std::is_same_v<typename Math::Element, BFloat16> ? 2 : 1;
template <class Math>
constexpr int kNegativeParts = Math::kPlanes;

__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}

}  // namespace pxc::cuda
