// Enqueue in two steps. Collect: per image and class, the mean of the normalised pixel embeddings (the region)
// and the pixels of smallest (priority, pixel), as candidate rows of a fixed shape. Write: the candidates that
// are labelled go into the rings, in image order.
//
// The map is read once, in blocks of pixels that stay in cache for two looks: norms, then sums by class. Every
// image is cut into kStripes runs of blocks whose sums are added up in order, so that no sum depends on the
// thread count.
#include <cstring>

#include "cpu.h"
#include "pixels.h"
#include "pools.h"

namespace pxc {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 512;

// Among kLanes consecutive pixels of a block, those of one class.
struct Group {
  int64_t label;
  int64_t first;            // pixel of the block
  uint32_t member[kLanes];  // all ones or zero: a select by `and` keeps a NaN pixel out of the other classes
};

// One thread's view of a block: fp32, channel by channel, its pixels contiguous and padded to whole groups.
struct Block {
  const float* pixels;
  int64_t stride;  // between channels
  int64_t size;
  std::vector<float> copy;
  float weights[kBlock];  // 1 / norm of each pixel
  std::vector<Group> groups;
};

template <class In>
void fetch(const CollectParams& p, int64_t first_pixel, int64_t size, Block& block) {
  const In* map = static_cast<const In*>(p.map);
  const bool plain = p.stride_column == 1 && p.stride_row == p.width && size % kLanes == 0;
  block.size = size;
  if constexpr (std::is_same_v<In, float>) {
    if (plain) {
      block.pixels = map + pixel_offset(p, first_pixel);
      block.stride = p.stride_channel;
      return;
    }
  }
  block.copy.resize(p.channels * kBlock);
  block.pixels = block.copy.data();
  block.stride = kBlock;
  float* copy = block.copy.data();
  if (p.stride_channel == 1) {
    for (int64_t i = 0; i < size; ++i) {
      const In* pixel = map + pixel_offset(p, first_pixel + i);
      for (int64_t d = 0; d < p.channels; ++d) copy[d * kBlock + i] = load(pixel + d);
    }
  } else {
    int64_t offsets[kBlock];
    for (int64_t i = 0; i < size; ++i) offsets[i] = pixel_offset(p, first_pixel + i);
    for (int64_t d = 0; d < p.channels; ++d) {
      const In* channel = map + d * p.stride_channel;
      for (int64_t i = 0; i < size; ++i) copy[d * kBlock + i] = load(channel + offsets[i]);
    }
  }
}

void weigh(const CollectParams& p, Block& block) {
  std::fill(block.weights, block.weights + kBlock, p.normalize ? 0.f : 1.f);
  if (!p.normalize) return;
  for (int64_t d = 0; d < p.channels; ++d) {
    const float* channel = block.pixels + d * block.stride;
    for (int64_t i = 0; i < block.size; ++i) block.weights[i] += channel[i] * channel[i];
  }
  for (int64_t i = 0; i < block.size; ++i) block.weights[i] = inverse_norm(block.weights[i]);
}

// The block's classes as groups, those of one class together.
void group(const CollectParams& p, const int64_t* labels, Block& block) {
  block.groups.clear();
  for (int64_t first = 0; first < block.size; first += kLanes) {
    const size_t start = block.groups.size();
    for (int64_t lane = 0; lane < std::min(kLanes, block.size - first); ++lane) {
      const int64_t label = labels[first + lane];
      if (label == p.ignore_index) continue;
      size_t g = start;
      while (g < block.groups.size() && block.groups[g].label != label) ++g;
      if (g == block.groups.size()) block.groups.push_back({label, first, {}});
      block.groups[g].member[lane] = ~0u;
    }
  }
  std::stable_sort(block.groups.begin(), block.groups.end(),
                   [](const Group& a, const Group& b) { return a.label < b.label; });
}

void add_to_sums(const CollectParams& p, const Block& block, double* sums) {
  for (int64_t d = 0; d < p.channels; ++d) {
    const float* channel = block.pixels + d * block.stride;
    for (size_t g = 0; g < block.groups.size();) {
      const int64_t label = block.groups[g].label;
      float lanes[kLanes] = {};
      for (; g < block.groups.size() && block.groups[g].label == label; ++g) {
        const Group& group = block.groups[g];
        const float *pixels = channel + group.first, *weights = block.weights + group.first;
        for (int64_t j = 0; j < kLanes; ++j) {
          const uint32_t bits = __builtin_bit_cast(uint32_t, pixels[j] * weights[j]) & group.member[j];
          lanes[j] += __builtin_bit_cast(float, bits);
        }
      }
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
      }
      sums[label * p.channels + d] += double(lanes[0]);
    }
  }
}

// sums [B, kStripes, C, D]
template <class In>
void sum_classes(const CollectParams& p) {
  const int64_t pixels = p.height * p.width, blocks = (pixels + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(p.threads)
  {
    Block block;
#pragma omp for schedule(static) collapse(2)
    for (int64_t image = 0; image < p.batch; ++image) {
      for (int64_t stripe = 0; stripe < kStripes; ++stripe) {
        double* sums = p.sums + (image * kStripes + stripe) * p.num_classes * p.channels;
        std::fill(sums, sums + p.num_classes * p.channels, 0.0);
        const int64_t last = blocks * (stripe + 1) / kStripes;
        for (int64_t index = blocks * stripe / kStripes; index < last; ++index) {
          const int64_t first = image * pixels + index * kBlock;
          fetch<In>(p, first, std::min(kBlock, pixels - index * kBlock), block);
          group(p, p.labels + first, block);
          weigh(p, block);
          add_to_sums(p, block, sums);
        }
      }
    }
  }
}

// What one image offers: how many pixels each class has, and which of them become candidates.
struct Offer {
  std::vector<int64_t> counts;         // [C]
  std::vector<int64_t> indices, rows;  // flat over B * pixels; rows of [B, C, 1 + pixels_per_image]
};

void choose_pixels(const CollectParams& p, int64_t image, Offer& offer) {
  const int64_t pixels = p.height * p.width, first = image * pixels;
  offer.counts.assign(p.num_classes, 0);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t label = class_of(p.labels, first + pixel, p.num_classes, p.ignore_index);
    if (label >= 0) ++offer.counts[label];
  }
  std::vector<int64_t> ends(p.num_classes, 0);
  for (int64_t label = 1; label < p.num_classes; ++label) {
    ends[label] = ends[label - 1] + offer.counts[label - 1];
  }
  uint64_t* keys = p.pool_keys + first;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t label = p.labels[first + pixel];
    if (label != p.ignore_index) keys[ends[label]++] = pool_key(p.priority[first + pixel], pixel);
  }
  for (int64_t label = 0; label < p.num_classes; ++label) {
    uint64_t* pool = keys + ends[label] - offer.counts[label];
    const int64_t keep = std::min(p.pixels_per_image, offer.counts[label]);
    keep_smallest(pool, offer.counts[label], keep);
    const int64_t region = (image * p.num_classes + label) * (1 + p.pixels_per_image);
    for (int64_t i = 0; i < keep; ++i) {
      offer.indices.push_back(first + pixel_of(pool[i]));
      offer.rows.push_back(region + 1 + i);
    }
  }
}

// Stores a row unless its norm, as stored, is zero or not finite.
template <class Out>
void store_row(const CollectParams& p, int64_t row, const float* values, float scale) {
  Out* stored = static_cast<Out*>(p.rows) + row * p.channels;
  float squares = 0.f;
  for (int64_t d = 0; d < p.channels; ++d) {
    store(stored + d, values[d] * scale);
    squares += load(stored + d) * load(stored + d);
  }
  if (squares > 0.f && std::isfinite(squares)) {
    p.row_labels[row] = int32_t(row / (1 + p.pixels_per_image) % p.num_classes);
  } else {
    std::fill(stored, stored + p.channels, Out{});
  }
}

template <class Out>
void store_regions(const CollectParams& p, int64_t image, const std::vector<int64_t>& counts) {
  std::vector<float> mean(p.channels);
  for (int64_t label = 0; label < p.num_classes; ++label) {
    if (counts[label] == 0) continue;
    std::vector<double> sum(p.channels, 0.0);
    double squares = 0.0;
    for (int64_t stripe = 0; stripe < kStripes; ++stripe) {
      const double* part = p.sums + ((image * kStripes + stripe) * p.num_classes + label) * p.channels;
      for (int64_t d = 0; d < p.channels; ++d) sum[d] += part[d];
    }
    for (double value : sum) squares += value * value;
    // A zero or NaN sum needs no scale: store_row refuses it.
    const double scale = !p.normalize ? 1.0 / double(counts[label]) : squares > 0.0 ? 1.0 / std::sqrt(squares) : 1.0;
    for (int64_t d = 0; d < p.channels; ++d) mean[d] = float(sum[d] * scale);
    store_row<Out>(p, (image * p.num_classes + label) * (1 + p.pixels_per_image), mean.data(), 1.f);
  }
}

template <class In, class Out>
void store_candidates(const CollectParams& p, const std::vector<Offer>& offers) {
  std::vector<int64_t> indices, rows;
  for (const Offer& offer : offers) {
    indices.insert(indices.end(), offer.indices.begin(), offer.indices.end());
    rows.insert(rows.end(), offer.rows.begin(), offer.rows.end());
  }
  read_pixels<In>(p, indices.data(), int64_t(indices.size()), p.wide, p.threads);
  const int64_t num_rows = p.batch * p.num_classes * (1 + p.pixels_per_image);
  std::fill(p.row_labels, p.row_labels + num_rows, -1);
  std::memset(p.rows, 0, size_t(num_rows * p.channels) * sizeof(Out));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) store_regions<Out>(p, image, offers[image].counts);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < int64_t(rows.size()); ++i) {
    const float* pixel = p.wide + i * p.channels;
    store_row<Out>(p, rows[i], pixel, p.normalize ? inverse_norm(pixel, p.channels) : 1.f);
  }
}

}  // namespace

void collect(const CollectParams& p) {
  std::vector<Offer> offers(p.batch);
  FirstBadValue bad;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) {
    bad.guard([&] { choose_pixels(p, image, offers[image]); });
  }
  bad.rethrow();
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    sum_classes<In>(p);
    with_dtype(p.rows_dtype,
               [&](auto* out) { store_candidates<In, std::remove_pointer_t<decltype(out)>>(p, offers); });
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
  const int64_t written = int64_t(chosen.size());
  const int64_t base = label * (p.region_slots + p.pixel_slots) + ring.offset;
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
    write_ring(p, c,
               {1, 1 + p.pixels_per_image, p.region_slots, p.pixel_slots, p.pixel_ptr + c, p.pixel_fill + c});
  }
}

}  // namespace pxc
