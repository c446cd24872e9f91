// Gathering chosen pixels out of the strided map, and scattering their gradient back into a dense one.
// The gradient is zeroed and filled once. Several rows may name one pixel; they add up in row order, whatever
// the thread count, because the second loop below gives each thread channels and not rows.
#include <cstring>

#include "cpu.h"
#include "map.h"
#include "pools.h"

namespace pxc {
namespace {

void check_index(const EmbeddingMap& m, const int64_t* indices, int64_t row) {
  if (indices[row] < 0 || indices[row] >= m.batch * m.height * m.width) throw BadValue{row, indices[row]};
}

template <class In, class Out>
void gather_rows(const GatherParams& p) {
  const In* map = static_cast<const In*>(p.map);
  Out* rows = static_cast<Out*>(p.rows);
  FirstBadValue bad;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    bad.guard([&] {
      check_index(p, p.indices, i);
      p.inv_norm[i] = copy_pixel(map + pixel_offset(p, p.indices[i]), p.stride_channel, p.channels,
                                 p.normalize, rows + i * p.channels);
    });
  }
  bad.rethrow();
}

// d(x / |x|): the gradient less its part along the row. A row without gradient stays exactly zero, so that
// padding cannot carry a NaN pixel into the map's gradient.
template <class In, class Row>
void differentiate_rows(const GatherBackwardParams& p) {
  const In* map = static_cast<const In*>(p.map);
  const Row* grad_rows = static_cast<const Row*>(p.grad_rows);
  FirstBadValue bad;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    bad.guard([&] {
      check_index(p, p.indices, i);
      const In* pixel = map + pixel_offset(p, p.indices[i]);
      const Row* grad = grad_rows + i * p.channels;
      float* out = p.row_gradients + i * p.channels;
      bool any = false;
      for (int64_t d = 0; d < p.channels; ++d) {
        out[d] = load(grad + d);
        any |= out[d] != 0.f;
      }
      if (!p.normalize || !any) return;
      const float scale = p.inv_norm[i];
      float along = 0.f;
      for (int64_t d = 0; d < p.channels; ++d) along += out[d] * (load(pixel + d * p.stride_channel) * scale);
      for (int64_t d = 0; d < p.channels; ++d) {
        out[d] = scale * (out[d] - along * (load(pixel + d * p.stride_channel) * scale));
      }
    });
  }
  bad.rethrow();
}

template <class In>
void scatter(const GatherBackwardParams& p) {
  In* grad = static_cast<In*>(p.grad_map);
  const int64_t bytes = p.batch * p.channels * p.height * p.width * int64_t(sizeof(In));
  constexpr int64_t kChunk = 1 << 20;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t start = 0; start < bytes; start += kChunk) {
    std::memset(static_cast<char*>(p.grad_map) + start, 0, size_t(std::min(kChunk, bytes - start)));
  }
  EmbeddingMap target = p;
  target.stride_batch = p.grad_stride_batch;
  target.stride_row = p.grad_stride_row;
  target.stride_column = p.grad_stride_column;
  constexpr int64_t kChannels = 16;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t first = 0; first < p.channels; first += kChannels) {
    const int64_t last = std::min(first + kChannels, p.channels);
    for (int64_t i = 0; i < p.num_rows; ++i) {
      In* pixel = grad + pixel_offset(target, p.indices[i]);
      const float* row = p.row_gradients + i * p.channels;
      for (int64_t d = first; d < last; ++d) {
        if (row[d] == 0.f) continue;  // most rows of a small batch are padding
        In* element = pixel + d * p.grad_stride_channel;
        store(element, load(element) + row[d]);
      }
    }
  }
}

}  // namespace

void gather(const GatherParams& p) {
  with_dtype(p.map_dtype, [&](auto* in) {
    with_dtype(p.rows_dtype, [&](auto* out) {
      gather_rows<std::remove_pointer_t<decltype(in)>, std::remove_pointer_t<decltype(out)>>(p);
    });
  });
}

void gather_backward(const GatherBackwardParams& p) {
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    with_dtype(p.rows_dtype, [&](auto* row) {
      differentiate_rows<In, std::remove_pointer_t<decltype(row)>>(p);
    });
    scatter<In>(p);
  });
}

}  // namespace pxc
