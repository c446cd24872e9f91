// Reading pixels out of an embedding map of any strides.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace pxc {
namespace {

// Offset of a pixel's first channel; `index` is flat over B * H * W.
inline int64_t pixel_offset(const EmbeddingMap& m, int64_t index) {
  const int64_t column = index % m.width, line = index / m.width;
  return line / m.height * m.stride_batch + line % m.height * m.stride_row + column * m.stride_column;
}

// 1 / norm; 0 for a zero norm and for one that overflows fp32; NaN stays NaN.
inline float inverse_norm(float sum_of_squares) {
  return sum_of_squares > 0.f ? 1.f / std::sqrt(sum_of_squares) : sum_of_squares;
}

// Copies one pixel's channels, scaled to unit norm if asked, and returns the scale.
template <class In, class Out>
inline float copy_pixel(const In* pixel, int64_t stride, int64_t channels, bool normalize, Out* row) {
  float scale = 1.f;
  if (normalize) {
    float sum = 0.f;
    for (int64_t d = 0; d < channels; ++d) {
      const float value = load(pixel + d * stride);
      sum += value * value;
    }
    scale = inverse_norm(sum);
  }
  for (int64_t d = 0; d < channels; ++d) store(row + d, load(pixel + d * stride) * scale);
  return scale;
}

}  // namespace
}  // namespace pxc
