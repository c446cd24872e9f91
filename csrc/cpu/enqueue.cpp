// Enqueue in two steps. Collect: per image and class, the mean of the normalised pixel embeddings (the
// region) and the pixels of smallest (priority, pixel), as candidate rows of a fixed shape. Write: the
// candidates that are labelled go into the rings, in image order.
//
// The map is read twice: once for the norms, and once for the class sums and the chosen pixels. Where
// channels are planes of memory, each pass reads straight along them. Reading the map only once, in blocks
// that stay in cache, was slower: a block is a small piece of every plane, each on a page of its own. Other
// layouts are copied plane by plane for the second pass. No sum is shared between threads, so no result
// depends on their number.
#include <cstring>

#include "cpu.h"
#include "pixels.h"
#include "pools.h"

namespace pxc::cpu {
namespace {

constexpr int64_t kWindow = 256;   // pixels whose groups are sorted by class
constexpr int64_t kFlush = 1024;   // groups summed in fp32 before they go into doubles
constexpr int64_t kShare = 4096;   // pixels that a thread takes at a time in the first pass
constexpr int64_t kChannels = 16;  // channels that it takes at a time in the second

// What one image offers.
struct Offer {
  std::vector<int64_t> counts;  // [C] pixels of each class
  std::vector<int64_t> pixels;  // the chosen ones, as indices within the image
  std::vector<int64_t> rows;    // where those go in [B, C, 1 + pixels_per_image]
  std::vector<Group> groups;    // in the order of the pixels, sorted by class within a window
};

// Which pixels of an image are candidates.
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
      offer.pixels.push_back(pixel_of(pool[i]));
      offer.rows.push_back(region + 1 + i);
    }
  }
}

// Neighbouring groups of one class are brought together: sums then stay in registers, and memory is still
// read almost in order.
void group_pixels(const CollectParams& p, int64_t image, Offer& offer) {
  const int64_t pixels = p.height * p.width;
  const int64_t* labels = p.labels + image * pixels;
  std::vector<Group>& groups = offer.groups;
  for (int64_t window = 0; window < pixels; window += kWindow) {
    const size_t first_of_window = groups.size();
    for (int64_t first = window; first < std::min(window + kWindow, pixels); first += kLanes) {
      const size_t start = groups.size();
      for (int64_t lane = 0; lane < std::min(kLanes, pixels - first); ++lane) {
        const int64_t label = labels[first + lane];
        if (label == p.ignore_index) continue;
        size_t g = start;
        while (g < groups.size() && groups[g].label != label) ++g;
        if (g == groups.size()) groups.push_back({label, first, {}});
        groups[g].member[lane] = ~0u;
      }
    }
    std::stable_sort(groups.begin() + int64_t(first_of_window), groups.end(),
                     [](const Group& a, const Group& b) { return a.label < b.label; });
  }
}

bool has_planes(const CollectParams& p) { return p.stride_column == 1 && p.stride_row == p.width; }

// 1 / norm of `size` consecutive pixels, or 1 if they are not normalised.
template <class In>
void weigh(const CollectParams& p, int64_t first, int64_t size, float* weights) {
  if (!p.normalize) return std::fill(weights, weights + size, 1.f);
  const In* map = static_cast<const In*>(p.map);
  if (!has_planes(p)) {
    for (int64_t i = 0; i < size; ++i) {
      const In* pixel = map + pixel_offset(p, first + i);
      float sum = 0.f;
      for (int64_t d = 0; d < p.channels; ++d) {
        const float value = load(pixel + d * p.stride_channel);
        sum += value * value;
      }
      weights[i] = inverse_norm(sum);
    }
    return;
  }
  std::fill(weights, weights + size, 0.f);
  vector_kernels().add_squares(p.map_dtype, map + pixel_offset(p, first), p.channels, p.stride_channel, size,
                               weights);
  for (int64_t i = 0; i < size; ++i) weights[i] = inverse_norm(weights[i]);
}

// Adds to sums[label, 0 .. num_planes) the sum over the class's pixels, each times its weight.
void sum_classes(const CollectParams& p, const Offer& offer, const float* const* planes, int num_planes,
                 const float* weights, std::vector<float>& strands, double* sums) {
  const int64_t size = int64_t(offer.groups.size());
  for (int64_t g = 0; g < size; g += kFlush) {
    strands.assign(p.num_classes * num_planes * kLanes, 0.f);
    vector_kernels().add_groups(&offer.groups[g], std::min(kFlush, size - g), planes, num_planes, weights,
                                strands.data());
    for (int64_t label = 0; label < p.num_classes; ++label) {
      if (offer.counts[label] == 0) continue;
      for (int n = 0; n < num_planes; ++n) {
        const float* strand = &strands[(label * num_planes + n) * kLanes];
        float halves[kLanes / 2], total = 0.f;
        for (int64_t j = 0; j < kLanes / 2; ++j) halves[j] = strand[j] + strand[j + kLanes / 2];
        for (float half : halves) total += half;
        sums[label * p.channels + n] += double(total);
      }
    }
  }
}

// Stores a row unless its norm, as stored, is zero or not finite.
template <class Out>
void store_row(const CollectParams& p, int64_t row, const float* values) {
  Out* stored = static_cast<Out*>(p.rows.data) + row * p.channels;
  float squares = 0.f;
  for (int64_t d = 0; d < p.channels; ++d) {
    store(stored + d, values[d]);
    squares += load(stored + d) * load(stored + d);
  }
  if (squares > 0.f && std::isfinite(squares)) {
    p.row_labels[row] = int32_t(row / (1 + p.pixels_per_image) % p.num_classes);
  } else {
    std::fill(stored, stored + p.channels, Out{});
  }
}

// One thread's memory for read_channels.
struct Scratch {
  std::vector<float> copies[2];
  std::vector<float> strands;  // [C, 2, kLanes]
};

// One channel of one image as contiguous fp32 pixels, padded to whole groups. This is the map itself where it
// already has that form.
template <class In>
const float* plane_of(const CollectParams& p, const In* channel, std::vector<float>& copy) {
  const int64_t pixels = p.height * p.width;
  if constexpr (std::is_same_v<In, float>) {
    if (has_planes(p) && pixels % kLanes == 0) return channel;
  }
  copy.resize((pixels + kLanes - 1) / kLanes * kLanes);
  if (has_planes(p)) {
    vector_kernels().widen({.source = {channel, p.map_dtype},
                            .indices = nullptr,
                            .num_rows = 1,
                            .channels = pixels,
                            .rows = copy.data(),
                            .threads = 1});
    return copy.data();
  }
  for (int64_t h = 0, i = 0; h < p.height; ++h) {
    const In* line = channel + h * p.stride_row;
    for (int64_t w = 0; w < p.width; ++w, ++i) copy[i] = load(line + w * p.stride_column);
  }
  return copy.data();
}

// Class sums [B, C, D] and chosen pixels [.., D] of some channels of one image.
template <class In>
void read_channels(const CollectParams& p, int64_t image, int64_t first, int64_t last, const Offer& offer,
                   float* wide, Scratch& scratch) {
  const In* map = static_cast<const In*>(p.map) + image * p.stride_batch;
  const float* weights = p.weights + image * p.height * p.width;
  double* sums = p.sums + image * p.num_classes * p.channels;
  for (int64_t d = first; d < last;) {
    const int count = d + 2 <= last ? 2 : 1;
    const float* planes[2];
    for (int n = 0; n < count; ++n)
      planes[n] = plane_of(p, map + (d + n) * p.stride_channel, scratch.copies[n]);
    sum_classes(p, offer, planes, count, weights, scratch.strands, sums + d);
    for (size_t i = 0; i < offer.pixels.size(); ++i) {
      const int64_t pixel = offer.pixels[i];
      for (int n = 0; n < count; ++n)
        wide[int64_t(i) * p.channels + d + n] = planes[n][pixel] * weights[pixel];
    }
    d += count;
  }
}

template <class Out>
void store_candidates(const CollectParams& p, int64_t image, const Offer& offer, const float* wide) {
  std::vector<float> mean(p.channels);
  for (int64_t label = 0; label < p.num_classes; ++label) {
    if (offer.counts[label] == 0) continue;
    const int64_t pair = image * p.num_classes + label;
    const double* sum = p.sums + pair * p.channels;
    double squares = 0.0;
    for (int64_t d = 0; d < p.channels; ++d) squares += sum[d] * sum[d];
    // A zero or NaN sum needs no scale: store_row refuses it.
    const double to_unit = squares > 0.0 ? 1.0 / std::sqrt(squares) : 1.0;
    const double scale = p.normalize ? to_unit : 1.0 / double(offer.counts[label]);
    for (int64_t d = 0; d < p.channels; ++d) mean[d] = float(sum[d] * scale);
    store_row<Out>(p, pair * (1 + p.pixels_per_image), mean.data());
  }
  for (size_t i = 0; i < offer.pixels.size(); ++i) {
    store_row<Out>(p, offer.rows[i], wide + int64_t(i) * p.channels);
  }
}

template <class In, class Out>
void collect_rows(const CollectParams& p, const std::vector<Offer>& offers) {
  const int64_t pixels = p.height * p.width, parts = (pixels + kShare - 1) / kShare;
  const int64_t channel_blocks = (p.channels + kChannels - 1) / kChannels;
  std::vector<int64_t> first_row(p.batch + 1, 0);
  for (int64_t image = 0; image < p.batch; ++image) {
    first_row[image + 1] = first_row[image] + int64_t(offers[image].pixels.size());
  }
  const int64_t rows = p.batch * p.num_classes * (1 + p.pixels_per_image);
  std::fill(p.row_labels, p.row_labels + rows, -1);
  std::memset(p.rows.data, 0, size_t(rows * p.channels) * sizeof(Out));
  std::fill(p.sums, p.sums + p.batch * p.num_classes * p.channels, 0.0);
  Guard guard;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch scratch;
#pragma omp for schedule(static) collapse(2)
    for (int64_t image = 0; image < p.batch; ++image) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = image * pixels + part * kShare;
        weigh<In>(p, first, std::min(kShare, pixels - part * kShare), p.weights + first);
      }
    }
#pragma omp for schedule(static) collapse(2)
    for (int64_t image = 0; image < p.batch; ++image) {
      for (int64_t block = 0; block < channel_blocks; ++block) {
        guard.run([&] {
          read_channels<In>(p, image, block * kChannels, std::min((block + 1) * kChannels, p.channels),
                            offers[image], p.wide + first_row[image] * p.channels, scratch);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t image = 0; image < p.batch; ++image) {
      guard.run(
          [&] { store_candidates<Out>(p, image, offers[image], p.wide + first_row[image] * p.channels); });
    }
  }
  guard.rethrow();
}

}  // namespace

void collect(const CollectParams& p) {
  std::vector<Offer> offers(p.batch);
  Guard guard;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) {
    guard.run([&] {
      choose_pixels(p, image, offers[image]);
      group_pixels(p, image, offers[image]);
    });
  }
  guard.rethrow();
  with_dtype(p.map_dtype, [&](auto* in) {
    with_dtype(p.rows.dtype, [&](auto* out) {
      collect_rows<std::remove_pointer_t<decltype(in)>, std::remove_pointer_t<decltype(out)>>(p, offers);
    });
  });
}

namespace {

// The region or the pixel ring of one class: its candidates are slots [first_slot, last_slot) of every image.
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
  // In an error, pointers have even positions and fills odd ones.
  const auto check = [](int64_t label, int64_t ptr, int64_t fill, int64_t slots) {
    if (ptr < 0 || ptr >= std::max<int64_t>(1, slots)) throw BadValue{2 * label, ptr};
    if (fill < 0 || fill > slots) throw BadValue{2 * label + 1, fill};
  };
  for (int64_t c = 0; c < p.num_classes; ++c) {  // before anything is written
    check(c, p.region_ptr[c], p.region_fill[c], p.region_slots);
    check(c, p.pixel_ptr[c], p.pixel_fill[c], p.pixel_slots);
  }
  Guard guard;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < p.num_classes; ++c) {
    guard.run([&] {
      write_ring(p, c, {0, 1, 0, p.region_slots, p.region_ptr + c, p.region_fill + c});
      write_ring(
          p, c,
          {1, 1 + p.pixels_per_image, p.region_slots, p.pixel_slots, p.pixel_ptr + c, p.pixel_fill + c});
    });
  }
  guard.rethrow();
}

}  // namespace pxc::cpu
