// Reading pixels out of an embedding map of any strides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "half.h"

namespace pxc::cpu {
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

// The same for a row, summed in kLanes strands that the compiler keeps in vectors.
inline float inverse_norm(const float* row, int64_t channels) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {}, sum = 0.f;
  int64_t d = 0;
  for (; d + kLanes <= channels; d += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += row[d + j] * row[d + j];
  }
  for (; d < channels; ++d) sum += row[d] * row[d];
  for (float lane : lanes) sum += lane;
  return inverse_norm(sum);
}

// Calls visit(row, channel, element) for every channel of the pixels at `indices`, a few channels of one
// image at a time. Where channels are planes, this stays within a few pages; going pixel by pixel would touch
// a page per channel. No two threads get the same (row, channel), and each gets its rows in order.
template <class Element, class Visit>
void visit_pixels(const EmbeddingMap& m, const int64_t* indices, int64_t num_rows, Element* map, int threads,
                  Visit visit) {
  constexpr int64_t kChannels = 16;
  const int64_t pixels = m.height * m.width, blocks = (m.channels + kChannels - 1) / kChannels;
  std::vector<int64_t> rows(num_rows), offsets(num_rows), first(m.batch + 1, 0);
  for (int64_t i = 0; i < num_rows; ++i) ++first[indices[i] / pixels + 1];
  for (int64_t image = 0; image < m.batch; ++image) first[image + 1] += first[image];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t place = next[indices[i] / pixels]++;
    rows[place] = i;
    offsets[place] = pixel_offset(m, indices[i]);
  }
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t image = 0; image < m.batch; ++image) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t last = std::min((block + 1) * kChannels, m.channels);
      for (int64_t d = block * kChannels; d < last; ++d) {
        Element* channel = map + d * m.stride_channel;
        Element* next = d + 1 < last ? channel + m.stride_channel : channel;
        for (int64_t i = first[image]; i < first[image + 1]; ++i) {
          __builtin_prefetch(next + offsets[i]);
          visit(rows[i], d, channel + offsets[i]);
        }
      }
    }
  }
}

// wide[i] = the pixel at indices[i], in fp32.
template <class In>
void read_pixels(const EmbeddingMap& m, const int64_t* indices, int64_t num_rows, float* wide, int threads) {
  visit_pixels(
      m, indices, num_rows, static_cast<const In*>(m.map), threads,
      [=](int64_t row, int64_t d, const In* element) { wide[row * m.channels + d] = load(element); });
}

}  // namespace
}  // namespace pxc::cpu
