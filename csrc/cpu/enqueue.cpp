// Enqueue in two steps. Collect: per image and class, the mean of the normalised pixel embeddings (the region)
// and the pixels of smallest (priority, pixel), as candidate rows of a fixed shape. Write: the candidates that
// are labelled go into the rings, in image order.
//
// The map is read twice, once for the norms and once for the means, both times along its memory. Means are
// summed in double precision by (image, channel block), pixel by pixel, so no sum depends on the thread count.
#include <cstring>
#include <vector>

#include "cpu.h"
#include "map.h"
#include "pools.h"

namespace pxc {
namespace {

constexpr int64_t kChannelBlock = 16;
constexpr int64_t kPixelBlock = 64;

// inv_norm of every pixel of one image line; 1 if the bank takes embeddings as they are.
template <class In>
void line_norms(const CollectParams& p, const In* line, float* inv_norm) {
  if (!p.normalize) {
    std::fill(inv_norm, inv_norm + p.width, 1.f);
    return;
  }
  if (p.stride_channel == 1) {
    for (int64_t w = 0; w < p.width; ++w) {
      const In* pixel = line + w * p.stride_column;
      float lanes[kChannelBlock] = {};
      int64_t d = 0;
      for (; d + kChannelBlock <= p.channels; d += kChannelBlock) {
        for (int64_t j = 0; j < kChannelBlock; ++j) {
          const float value = load(pixel + d + j);
          lanes[j] += value * value;
        }
      }
      float sum = 0.f;
      for (float lane : lanes) sum += lane;
      for (; d < p.channels; ++d) sum += load(pixel + d) * load(pixel + d);
      inv_norm[w] = inverse_norm(sum);
    }
    return;
  }
  std::fill(inv_norm, inv_norm + p.width, 0.f);
  for (int64_t d = 0; d < p.channels; ++d) {
    const In* channel = line + d * p.stride_channel;
    if (p.stride_column == 1) {  // its own loop: this one vectorises
      for (int64_t w = 0; w < p.width; ++w) inv_norm[w] += load(channel + w) * load(channel + w);
    } else {
      for (int64_t w = 0; w < p.width; ++w) {
        const float value = load(channel + w * p.stride_column);
        inv_norm[w] += value * value;
      }
    }
  }
  for (int64_t w = 0; w < p.width; ++w) inv_norm[w] = inverse_norm(inv_norm[w]);
}

// Adds up to kPixelBlock pixels of one line, up to kChannelBlock channels each, to their classes' sums.
template <class In>
void add_block(const CollectParams& p, const In* block, int64_t pixels, int64_t channels,
               const int64_t* labels, const float* inv_norm, double* sums) {
  float tile[kPixelBlock][kChannelBlock];
  for (int64_t j = 0; j < channels; ++j) {
    const In* channel = block + j * p.stride_channel;
    for (int64_t i = 0; i < pixels; ++i) tile[i][j] = load(channel + i * p.stride_column) * inv_norm[i];
  }
  for (int64_t i = 0; i < pixels; ++i) {
    if (labels[i] == p.ignore_index) continue;
    double* sum = sums + labels[i] * p.channels;
    if (channels == kChannelBlock) {
      for (int64_t j = 0; j < kChannelBlock; ++j) sum[j] += double(tile[i][j]);
    } else {
      for (int64_t j = 0; j < channels; ++j) sum[j] += double(tile[i][j]);
    }
  }
}

template <class In>
void sum_classes(const CollectParams& p) {
  const In* map = static_cast<const In*>(p.map);
  const int64_t pixels = p.height * p.width, blocks = (p.channels + kChannelBlock - 1) / kChannelBlock;
  std::memset(p.sums, 0, size_t(p.batch * p.num_classes * p.channels) * sizeof(double));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t line = 0; line < p.batch * p.height; ++line) {
    line_norms(p, map + pixel_offset(p, line * p.width), p.inv_norm + line * p.width);
  }
#pragma omp parallel for num_threads(p.threads) schedule(static) collapse(2)
  for (int64_t image = 0; image < p.batch; ++image) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * kChannelBlock;
      const int64_t channels = std::min(kChannelBlock, p.channels - channel);
      double* sums = p.sums + image * p.num_classes * p.channels + channel;
      for (int64_t row = 0; row < p.height; ++row) {
        for (int64_t column = 0; column < p.width; column += kPixelBlock) {
          const int64_t first = image * pixels + row * p.width + column;
          add_block(p, map + pixel_offset(p, first) + channel * p.stride_channel,
                    std::min(kPixelBlock, p.width - column), channels, p.labels + first,
                    p.inv_norm + first, sums);
        }
      }
    }
  }
}

// Whether a row that was just stored may go into the bank.
template <class Out>
bool is_storable(const Out* row, int64_t channels) {
  float sum = 0.f;
  for (int64_t d = 0; d < channels; ++d) sum += load(row + d) * load(row + d);
  return sum > 0.f && std::isfinite(sum);
}

template <class Out>
void store_region(const CollectParams& p, const double* sum, int64_t pixels, Out* row) {
  double scale = 1.0 / double(pixels);
  if (p.normalize) {
    double squares = 0.0;
    for (int64_t d = 0; d < p.channels; ++d) squares += sum[d] * sum[d];
    scale = squares > 0.0 ? 1.0 / std::sqrt(squares) : squares;
  }
  for (int64_t d = 0; d < p.channels; ++d) store(row + d, float(sum[d] * scale));
}

template <class In, class Out>
void store_candidates(const CollectParams& p, int64_t image, const int64_t* counts) {
  const In* map = static_cast<const In*>(p.map);
  const int64_t pixels = p.height * p.width, slots = 1 + p.pixels_per_image, first = image * pixels;
  uint64_t* keys = p.pool_keys + first;
  std::vector<int64_t> ends(p.num_classes);
  for (int64_t label = 0, used = 0; label < p.num_classes; ++label) {
    ends[label] = used;
    used += counts[label];
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t label = p.labels[first + pixel];
    if (label != p.ignore_index) keys[ends[label]++] = pool_key(p.priority[first + pixel], pixel);
  }
  for (int64_t label = 0; label < p.num_classes; ++label) {
    const int64_t pair = image * p.num_classes + label;
    Out* rows = static_cast<Out*>(p.rows) + pair * slots * p.channels;
    int32_t* row_labels = p.row_labels + pair * slots;
    int64_t filled = 0;
    if (counts[label] > 0) {
      uint64_t* pool = keys + ends[label] - counts[label];
      const int64_t keep = std::min(p.pixels_per_image, counts[label]);
      keep_smallest(pool, counts[label], keep);
      store_region(p, p.sums + pair * p.channels, counts[label], rows);
      for (int64_t i = 0; i < keep; ++i) {
        copy_pixel(map + pixel_offset(p, first + pixel_of(pool[i])), p.stride_channel, p.channels,
                   p.normalize, rows + (1 + i) * p.channels);
      }
      filled = 1 + keep;
    }
    for (int64_t i = 0; i < slots; ++i) {
      const bool good = i < filled && is_storable(rows + i * p.channels, p.channels);
      if (!good) std::memset(rows + i * p.channels, 0, size_t(p.channels) * sizeof(Out));
      row_labels[i] = good ? int32_t(label) : -1;
    }
  }
}

}  // namespace

void collect(const CollectParams& p) {
  const int64_t pixels = p.height * p.width;
  std::vector<int64_t> counts(p.batch * p.num_classes);
  FirstBadValue bad;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) {
    bad.guard([&] {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const int64_t label = class_of(p.labels, image * pixels + pixel, p.num_classes, p.ignore_index);
        if (label >= 0) ++counts[image * p.num_classes + label];
      }
    });
  }
  bad.rethrow();
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    sum_classes<In>(p);
    with_dtype(p.rows_dtype, [&](auto* out) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
      for (int64_t image = 0; image < p.batch; ++image) {
        store_candidates<In, std::remove_pointer_t<decltype(out)>>(p, image, &counts[image * p.num_classes]);
      }
    });
  });
}

namespace {

// One kind of memory of one class: its candidates are the slots [first_slot, last_slot) of every image.
struct Ring {
  int64_t first_slot, last_slot, offset, slots;
  int64_t *ptr, *fill;
};

void write_ring(const WriteParams& p, int64_t label, const Ring& ring) {
  if (ring.slots == 0) return;
  const int64_t candidates = 1 + p.pixels_per_image;
  std::vector<int64_t> chosen;
  for (int64_t image = 0; image < p.batch; ++image) {
    for (int64_t slot = ring.first_slot; slot < ring.last_slot; ++slot) {
      const int64_t row = (image * p.num_classes + label) * candidates + slot;
      if (p.row_labels[row] == label) chosen.push_back(row);
    }
  }
  const int64_t written = int64_t(chosen.size()), base = label * (p.region_slots + p.pixel_slots) + ring.offset;
  for (int64_t i = std::max<int64_t>(0, written - ring.slots); i < written; ++i) {
    const int64_t slot = base + (*ring.ptr + i) % ring.slots;
    std::memcpy(static_cast<char*>(p.keys) + slot * p.row_bytes,
                static_cast<const char*>(p.rows) + chosen[i] * p.row_bytes, size_t(p.row_bytes));
    p.key_labels[slot] = int32_t(label);
  }
  *ring.ptr = (*ring.ptr + written) % ring.slots;
  *ring.fill = std::min(*ring.fill + written, ring.slots);
}

}  // namespace

void write(const WriteParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < p.num_classes; ++c) {
    write_ring(p, c, {0, 1, 0, p.region_slots, p.region_ptr + c, p.region_fill + c});
    write_ring(p, c, {1, 1 + p.pixels_per_image, p.region_slots, p.pixel_slots, p.pixel_ptr + c, p.pixel_fill + c});
  }
}

}  // namespace pxc
