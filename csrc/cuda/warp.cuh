// Sums and maxima over the lanes of a warp, and over the threads of a block.
#pragma once

#include "../portable.h"

namespace pxc::cuda {

// The sum over all lanes, in a fixed order: every lane gets the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// The largest over all lanes; NaN is ignored unless all are.
__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}

// The largest over a block, which calls it as a whole, once for `warps`, its scratch of a number per warp.
template <int kThreads>
__device__ __forceinline__ float block_max(float value, float* warps) {
  value = warp_max(value);
  if (int(threadIdx.x) % kWarp == 0) warps[int(threadIdx.x) / kWarp] = value;
  sync_block();  // those of all warps are there
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value = fmaxf(value, warps[warp]);
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
