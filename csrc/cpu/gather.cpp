// Gathers chosen pixels from the strided map, and scatters their gradient back into a dense map, which is
// zeroed and filled once. Several rows may name the same pixel; their gradients add up in row order, whatever
// the thread count.
#include <cstring>
#include <numeric>

#include "cpu.h"
#include "pixels.h"

namespace pxc::cpu {
namespace {

void check_indices(const EmbeddingMap& m, const int64_t* indices, int64_t num_rows) {
  for (int64_t i = 0; i < num_rows; ++i) {
    if (indices[i] < 0 || indices[i] >= m.batch * m.height * m.width) throw BadValue{i, indices[i]};
  }
}

template <class Out>
void store_rows(const GatherParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const float* from = p.wide + i * p.channels;
    Out* to = static_cast<Out*>(p.rows.data) + i * p.channels;
    const float scale = p.normalize ? inverse_norm(from, p.channels) : 1.f;
    for (int64_t d = 0; d < p.channels; ++d) store(to + d, from[d] * scale);
    p.inv_norm[i] = scale;
  }
}

// The derivative of x / |x|: the gradient minus its component along the row, over the norm. A row whose
// gradient is zero stays exactly zero, so that padding cannot carry a NaN pixel into the map's gradient.
template <class Row>
void differentiate_rows(const GatherBackwardParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const Row* grad = static_cast<const Row*>(p.grad_rows.data) + i * p.channels;
    float* row = p.wide + i * p.channels;  // in: the pixel; out: its gradient
    const float scale = p.inv_norm[i];
    float along = 0.f;
    bool any = false;
    for (int64_t d = 0; d < p.channels; ++d) {
      along += load(grad + d) * (row[d] * scale);
      any |= load(grad + d) != 0.f;
    }
    for (int64_t d = 0; d < p.channels; ++d) {
      const float g = load(grad + d);
      row[d] = !any ? 0.f : p.normalize ? scale * (g - along * (row[d] * scale)) : g;
    }
  }
}

// Adds up the rows that name the same pixel, into the first of them, in row order and in fp32. Returns these
// first rows.
std::vector<int64_t> merge_repeats(const GatherBackwardParams& p) {
  std::vector<int64_t> order(p.num_rows), firsts;
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return p.indices[a] < p.indices[b]; });
  for (int64_t row : order) {
    if (firsts.empty() || p.indices[firsts.back()] != p.indices[row]) {
      firsts.push_back(row);
      continue;
    }
    float* sum = p.wide + firsts.back() * p.channels;
    for (int64_t d = 0; d < p.channels; ++d) sum[d] += p.wide[row * p.channels + d];
  }
  return firsts;
}

template <class Element>
void scatter(const GatherBackwardParams& p) {
  const int64_t bytes = p.batch * p.channels * p.height * p.width * int64_t(sizeof(Element));
  constexpr int64_t kChunk = 1 << 20;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t start = 0; start < bytes; start += kChunk) {
    std::memset(static_cast<char*>(p.grad_map) + start, 0, size_t(std::min(kChunk, bytes - start)));
  }
  EmbeddingMap target = p;
  target.stride_batch = p.grad_stride_batch;
  target.stride_channel = p.grad_stride_channel;
  target.stride_row = p.grad_stride_row;
  target.stride_column = p.grad_stride_column;
  const std::vector<int64_t> rows = merge_repeats(p);
  std::vector<int64_t> indices(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) indices[i] = p.indices[rows[i]];
  visit_pixels(
      target, indices.data(), int64_t(rows.size()), static_cast<Element*>(p.grad_map), p.threads,
      [&](int64_t i, int64_t d, Element* element) { store(element, p.wide[rows[i] * p.channels + d]); });
}

}  // namespace

void gather(const GatherParams& p) {
  check_indices(p, p.indices, p.num_rows);
  with_dtype(p.map_dtype, [&](auto* in) {
    read_pixels<std::remove_pointer_t<decltype(in)>>(p, p.indices, p.num_rows, p.wide, p.threads);
  });
  with_dtype(p.rows.dtype, [&](auto* out) { store_rows<std::remove_pointer_t<decltype(out)>>(p); });
}

void gather_backward(const GatherBackwardParams& p) {
  check_indices(p, p.indices, p.num_rows);
  with_dtype(p.map_dtype, [&](auto* in) {
    using Element = std::remove_pointer_t<decltype(in)>;
    read_pixels<Element>(p, p.indices, p.num_rows, p.wide, p.threads);
    with_dtype(p.grad_rows.dtype,
               [&](auto* row) { differentiate_rows<std::remove_pointer_t<decltype(row)>>(p); });
    scatter<Element>(p);
  });
}

}  // namespace pxc::cpu
