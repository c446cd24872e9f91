// Sums over the lanes of a warp.
#pragma once

#include "../portable.h"

namespace pxc::cuda {

// The sum over all lanes, in a fixed order: every lane gets the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// The sum over a lane and those before it.
template <class T>
__device__ __forceinline__ T warp_scan(T value) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const T before = shuffle_up(value, lanes);
    if (lane >= lanes) value += before;
  }
  return value;
}

}  // namespace pxc::cuda
