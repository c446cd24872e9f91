// Gathering chosen pixels from the strided map, a warp per row, and the dense gradient of the map: zeros,
// over which the sum of the rows that name a pixel is written, in row order, once.
#pragma once

#include "pixels.cuh"
#include "sort.cuh"

namespace pxc::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowsPerBlock = kRowThreads / kWarp;

__device__ __forceinline__ int64_t num_pixels(const EmbeddingMap& m) { return m.batch * m.height * m.width; }

__device__ __forceinline__ bool is_pixel(const EmbeddingMap& m, int64_t index) {
  return index >= 0 && index < num_pixels(m);
}

// The pixel is read twice, the second time from a cache, so that a row of any width needs no storage.
template <class In, class Out>
__global__ void __launch_bounds__(kRowThreads) gather_kernel(GatherParams p) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
  if (row >= p.num_rows) return;
  Out* out = static_cast<Out*>(p.rows.data) + row * p.channels;
  const int64_t index = p.indices[row];
  if (!is_pixel(p, index)) {
    for (int64_t d = lane; d < p.channels; d += kWarp) out[d] = from_float<Out>(0.f);
    if (lane == 0) p.inv_norm[row] = 0.f;
    return;
  }
  const In* pixel = static_cast<const In*>(p.map) + pixel_offset(p, index);
  const float scale = p.normalize ? inverse_norm(warp_squares(pixel, p.channels, p.stride_channel)) : 1.f;
  for (int64_t d = lane; d < p.channels; d += kWarp) {
    out[d] = from_float<Out>(to_float(pixel[d * p.stride_channel]) * scale);
  }
  if (lane == 0) p.inv_norm[row] = scale;
}

// d(x / |x|): the gradient less its part along the row. A row whose gradient is zero names no pixel from here
// on: padding can neither carry a NaN into the map's gradient, nor keep one thread busy with all of its rows.
template <class In, class Row>
__global__ void __launch_bounds__(kRowThreads, 4) gather_bwd_rows_kernel(GatherBackwardParams p) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
  if (row >= p.num_rows) return;
  const int64_t index = p.indices[row];
  const bool readable = is_pixel(p, index);
  const In* pixel = static_cast<const In*>(p.map) + (readable ? pixel_offset(p, index) : 0);
  const Row* grad = static_cast<const Row*>(p.grad_rows.data) + row * p.channels;
  float* wide = p.wide + row * p.channels;
  const float scale = p.inv_norm[row];
  float along = 0.f;
  bool some = false;
  for (int64_t d = lane; readable && d < p.channels; d += kWarp) {
    const float g = to_float(grad[d]);
    some |= g != 0.f;
    if (p.normalize) along += g * (to_float(pixel[d * p.stride_channel]) * scale);
  }
  some = ballot(some) != 0;
  along = warp_sum(along);
  for (int64_t d = lane; some && d < p.channels; d += kWarp) {
    const float g = to_float(grad[d]);
    wide[d] = p.normalize ? scale * (g - along * (to_float(pixel[d * p.stride_channel]) * scale)) : g;
  }
  if (lane == 0) p.row_pixels[row] = some ? index : -1;
}

// Writes a row and its pixel, -1 for none, to their place.
__device__ __forceinline__ auto put_in_order(const GatherBackwardParams& p) {
  return [&p](int64_t place, uint64_t pixel, int64_t row) {
    p.sorted_pixels[place] = int64_t(pixel) - 1;
    p.sorted_rows[place] = row;
  };
}

// Sorts the rows by (pixel, row), those without a pixel first: all of them if they make one tile, else by
// tiles.
__global__ void __launch_bounds__(kSortThreads, 1) gather_bwd_sort_kernel(GatherBackwardParams p) {
  SharedMemory shared;
  const auto key_of = [&p](int64_t row) { return p.row_pixels[row] + 1; };
  sort_numbers(shared, blockIdx.x, p.num_rows, p.sort_keys, key_of, put_in_order(p));
}

// Puts the rows of several tiles where they belong, a warp per row.
__global__ void __launch_bounds__(kRowThreads) gather_bwd_rank_kernel(GatherBackwardParams p, int64_t tiles) {
  const int64_t place = int64_t(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
  if (place < p.num_rows) emit_ranked(p.sort_keys, tiles, place, put_in_order(p));
}

// A warp per row: that of the first one to name a pixel adds up all that do.
template <class In>
__global__ void __launch_bounds__(kRowThreads) gather_bwd_map_kernel(GatherBackwardParams p) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t first = int64_t(blockIdx.x) * kRowsPerBlock + int(threadIdx.x) / kWarp;
  if (first >= p.num_rows) return;
  const int64_t pixel = p.sorted_pixels[first];
  if (pixel < 0 || (first > 0 && p.sorted_pixels[first - 1] == pixel)) return;
  int64_t last = first + 1;
  while (last < p.num_rows && p.sorted_pixels[last] == pixel) ++last;

  EmbeddingMap target = p;
  target.stride_batch = p.grad_stride_batch;
  target.stride_row = p.grad_stride_row;
  target.stride_column = p.grad_stride_column;
  In* to = static_cast<In*>(p.grad_map) + pixel_offset(target, pixel);
  for (int64_t d = lane; d < p.channels; d += kWarp) {
    float sum = 0.f;
    for (int64_t i = first; i < last; ++i) sum += p.wide[p.sorted_rows[i] * p.channels + d];
    to[d * p.grad_stride_channel] = from_float<In>(sum);
  }
}

}  // namespace
}  // namespace pxc::cuda
