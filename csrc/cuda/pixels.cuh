// Reading pixels of an embedding map of any strides, and their norms.
#pragma once

#include "warp.cuh"

namespace pxc::cuda {
namespace {

// Offset of a pixel's first channel; `index` is flat over B * H * W. Divides in 32 bits where it can, which
// takes a tenth of the time.
__device__ __forceinline__ int64_t pixel_offset(const EmbeddingMap& m, int64_t index) {
  int64_t image, row, column;
  if (m.batch * m.height * m.width <= INT64_C(0xffffffff)) {
    const uint32_t width = uint32_t(m.width), height = uint32_t(m.height), line = uint32_t(index) / width;
    column = uint32_t(index) % width;
    image = line / height;
    row = line % height;
  } else {
    column = index % m.width;
    image = index / m.width / m.height;
    row = index / m.width % m.height;
  }
  return image * m.stride_batch + row * m.stride_row + column * m.stride_column;
}

// Whether a pixel's channels are neighbours in memory: then lanes take channels, else pixels.
__host__ __device__ __forceinline__ bool lanes_take_channels(int64_t stride_channel, int64_t stride_column) {
  return stride_channel == 1 && stride_column != 1;
}

// 1 / norm; 0 for a zero norm and for one that overflows fp32; NaN stays NaN.
__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  return sum_of_squares > 0.f ? 1.f / sqrtf(sum_of_squares) : sum_of_squares;
}

// The sum of the squares of a pixel's channels; a warp calls it.
template <class In>
__device__ __forceinline__ float warp_squares(const In* pixel, int64_t channels, int64_t stride) {
  float squares = 0.f;
  for (int64_t d = int(threadIdx.x) % kWarp; d < channels; d += kWarp) {
    const float value = to_float(pixel[d * stride]);
    squares += value * value;
  }
  return warp_sum(squares);
}

}  // namespace
}  // namespace pxc::cuda
