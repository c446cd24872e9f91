// Enqueue in two steps. Collect: per image and class, the mean of the normalised pixel embeddings (the
// region) and the pixels of smallest (priority, pixel), as candidate rows of a fixed shape. Write: the
// candidates that are labelled go into the rings, in image order.
//
// The map is read once, a chunk of an image by each block, and leaves a sum per chunk and class behind. The
// order of every sum is fixed: within a chunk by pixel, in fp32, then by chunk, in fp64.
#pragma once

#include "pixels.cuh"
#include "pools.cuh"

namespace pxc::cuda {
namespace {

constexpr int kRegionThreads = 256;
constexpr int kRegionWarps = kRegionThreads / kWarp;
constexpr int kMaxSlice = 704;            // channels that are staged at once, of 32 pixels
constexpr size_t kMaxShared = 99 * 1024;  // what every supported device gives a block
constexpr int kWriteThreads = 256;

// How the blocks of collect_regions_kernel go about their chunks.
struct RegionTile {
  int strip;            // pixels that are staged at once: 32, 64 or 128
  int slice;            // and channels
  bool sums_in_shared;  // those of all classes; else they are where they end up
};

// What a pixel of the strip counts for.
struct alignas(8) Weight {
  int label;  // -1: nothing
  float weight;
};

// One block's pixels.
template <class In>
struct RegionChunk {
  const In* map;       // of its image
  int64_t first;       // pixel of the image
  int size;            // pixels
  const int* classes;  // [kChunk] of each pixel, -1 for one that counts for nothing
};

template <class In>
__device__ __forceinline__ const In* address_of(const CollectParams& p, const RegionChunk<In>& chunk, int i) {
  const uint32_t pixel = uint32_t(chunk.first) + uint32_t(i), width = uint32_t(p.width);
  return chunk.map + pixel / width * p.stride_row + pixel % width * p.stride_column;
}

// staged[channel][pixel] for a strip's pixels and a slice of their channels, zeros for pixels that count for
// nothing, and sums of squares, [parts][strip], to which every slice adds. Many loads of a thread are on
// the way at a time, or memory would wait for the lanes.
template <class In>
__device__ __forceinline__ void stage(const CollectParams& p, const RegionTile& tile,
                                      const RegionChunk<In>& chunk, int strip, int64_t first_channel,
                                      float* staged, float* squares) {
  constexpr int kInFlight = 32;
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int pitch = tile.strip + 1;  // odd, so that a column of lanes meets 32 banks as a row does
  const int channels = int(min(int64_t(tile.slice), p.channels - first_channel));
  if (!lanes_take_channels(p.stride_channel, p.stride_column)) {
    const int pixel = thread % tile.strip, part = thread / tile.strip, parts = kRegionThreads / tile.strip;
    const bool counts = chunk.classes[strip + pixel] >= 0;
    const In* source =
        counts ? address_of(p, chunk, strip + pixel) + first_channel * p.stride_channel : nullptr;
    const int present = counts ? channels : 0;
    const int64_t stride = p.stride_channel;
    float sum = 0.f;
    for (int d = part; d < channels; d += parts * kInFlight) {
      In values[kInFlight];
      for (int i = 0; i < kInFlight; ++i) {
        const int channel = d + i * parts;
        values[i] = channel < present ? source[channel * stride] : In{};
      }
      for (int i = 0; i < kInFlight; ++i) {
        const int channel = d + i * parts;
        const float value = to_float(values[i]);
        if (channel < channels) staged[channel * pitch + pixel] = value;
        sum += value * value;
      }
    }
    squares[thread] += sum;
    return;
  }
  constexpr int kPixels = 4, kColumns = kInFlight / kPixels;
  for (int first = warp * kPixels; first < tile.strip; first += kRegionWarps * kPixels) {
    const In* sources[kPixels];
    int present[kPixels];
    float sums[kPixels] = {};
    for (int j = 0; j < kPixels; ++j) {
      const bool counts = chunk.classes[strip + first + j] >= 0;
      present[j] = counts ? channels : 0;
      sources[j] = counts ? address_of(p, chunk, strip + first + j) + first_channel : nullptr;
    }
    for (int d = lane; d < channels; d += kColumns * kWarp) {
      float values[kPixels][kColumns];
      for (int j = 0; j < kPixels; ++j) {
        for (int i = 0; i < kColumns; ++i) {
          const int channel = d + i * kWarp;
          values[j][i] = channel < present[j] ? to_float(sources[j][channel]) : 0.f;
        }
      }
      for (int j = 0; j < kPixels; ++j) {
        for (int i = 0; i < kColumns; ++i) {
          const int channel = d + i * kWarp;
          if (channel < channels) staged[channel * pitch + first + j] = values[j][i];
          sums[j] += values[j][i] * values[j][i];
        }
      }
    }
    for (int j = 0; j < kPixels; ++j) {
      const float sum = warp_sum(sums[j]);
      if (lane == 0) squares[first + j] += sum;
    }
  }
}

// sums[label][channel] += the weighted pixels of a strip; thread d takes channel d. Sums of a run of one
// class stay in a register.
__device__ __forceinline__ void add_strip(const RegionTile& tile, const float* staged, const Weight* weights,
                                          int channels, float* sums, int64_t stride) {
  constexpr int kBatch = 8;
  for (int d = int(threadIdx.x); d < channels; d += kRegionThreads) {
    float run = 0.f;
    int label = -1;
    for (int first = 0; first < tile.strip; first += kBatch) {
      float values[kBatch];
      Weight of[kBatch];
      for (int i = 0; i < kBatch; ++i) {
        values[i] = staged[d * (tile.strip + 1) + first + i];
        of[i] = weights[first + i];
      }
      for (int i = 0; i < kBatch; ++i) {
        if (of[i].label != label) {
          if (label >= 0) sums[label * stride + d] += run;
          run = 0.f;
          label = of[i].label;
        }
        run += rounded_product(values[i], of[i].weight);  // so that opposite pixels add up to 0
      }
    }
    if (label >= 0) sums[label * stride + d] += run;
  }
}

// Sums of the normalised pixels of each class, a block per chunk. Norms take all channels, so a map with more
// of them than fit is read twice, strip by strip: the second time it is in a cache.
template <class In>
__global__ void __launch_bounds__(kRegionThreads, 2)
    collect_regions_kernel(CollectParams p, Pools pools, RegionTile tile) {
  const int thread = int(threadIdx.x);
  const int64_t image = blockIdx.x / pools.chunks, first = blockIdx.x % pools.chunks * kChunk;
  const int32_t* starts = pools.starts + int64_t(blockIdx.x) * (pools.pools + 1);
  if (starts[pools.pools] == 0) return;  // no pixel has a class
  const int64_t classes_by_channels = p.num_classes * p.channels;
  float* chunk_sums = p.chunk_sums + int64_t(blockIdx.x) * classes_by_channels;

  SharedMemory shared;
  int* classes = shared.take<int>(kChunk);
  float* staged = shared.take<float>(tile.slice * (tile.strip + 1));
  float* squares = shared.take<float>(kRegionThreads);
  Weight* weights = shared.take<Weight>(tile.strip);
  float* sums = tile.sums_in_shared ? shared.take<float>(classes_by_channels) : chunk_sums;
  const RegionChunk<In> chunk = {static_cast<const In*>(p.map) + image * p.stride_batch, first,
                                 int(min(int64_t(kChunk), pools.pixels - first)), classes};
  for (int i = thread; i < kChunk; i += kRegionThreads) {
    classes[i] = i < chunk.size
                     ? class_of(p.labels[image * pools.pixels + first + i], p.num_classes, p.ignore_index)
                     : -1;
  }
  const auto for_each_sum = [&](const auto& visit) {
    for (int64_t label = 0; label < p.num_classes; ++label) {
      if (starts[label] == starts[label + 1]) continue;
      for (int64_t d = thread; d < p.channels; d += kRegionThreads) visit(label * p.channels + d);
    }
  };
  for_each_sum([&](int64_t i) { sums[i] = 0.f; });

  for (int strip = 0; strip < chunk.size; strip += tile.strip) {
    squares[thread] = 0.f;
    sync_block();  // all squares are zero, the classes are there, and the strip before has been added
    for (int64_t d = 0; d < p.channels; d += tile.slice) stage(p, tile, chunk, strip, d, staged, squares);
    sync_block();  // all squares are there
    if (thread < tile.strip) {
      float sum = 0.f;
      for (int i = thread; i < kRegionThreads; i += tile.strip) sum += squares[i];
      weights[thread] = {classes[strip + thread], p.normalize ? inverse_norm(sum) : 1.f};
    }
    sync_block();  // and all weights
    for (int64_t d = 0; d < p.channels; d += tile.slice) {
      if (tile.slice < p.channels) {
        sync_block();  // the slice before has been added
        stage(p, tile, chunk, strip, d, staged, squares);
        sync_block();  // this one is staged
      }
      add_strip(tile, staged, weights, int(min(int64_t(tile.slice), p.channels - d)), sums + d, p.channels);
    }
  }
  if (!tile.sums_in_shared) return;
  sync_block();  // slices may have shared the channels out otherwise
  for_each_sum([&](int64_t i) { chunk_sums[i] = sums[i]; });
}

// Stores value(d) for all channels, or zeros if the norm of what is stored is zero or not finite; by a warp.
template <class Out, class Value>
__device__ __forceinline__ bool store_row(Out* row, int64_t channels, const Value& value) {
  const int lane = int(threadIdx.x) % kWarp;
  float squares = 0.f;
  for (int64_t d = lane; d < channels; d += kWarp) {
    row[d] = from_float<Out>(value(d));
    squares += to_float(row[d]) * to_float(row[d]);
  }
  squares = warp_sum(squares);
  const bool good = squares > 0.f && squares < INFINITY;
  for (int64_t d = lane; !good && d < channels; d += kWarp) row[d] = from_float<Out>(0.f);
  return good;
}

// What an image offers of one class, a block for each: first all threads sum the chunks and select the
// pixels, then a warp makes a row.
template <class In, class Out>
__global__ void __launch_bounds__(kSelectThreads) collect_rows_kernel(CollectParams p, Pools pools) {
  SharedMemory shared;
  const PixelMemory memory(shared);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t image = blockIdx.x / p.num_classes, label = blockIdx.x % p.num_classes;
  const Pool pool = pool_of(pools, image, label);
  const int size = pool_size(pool, memory.select.sums);
  const int keep = int(min(int64_t(size), p.pixels_per_image));
  int64_t* chosen = p.chosen_pixels + blockIdx.x * p.pixels_per_image;
  double* sums = p.sums + blockIdx.x * p.channels;
  for (int64_t d = thread; size > 0 && d < p.channels; d += kSelectThreads) {
    constexpr int kBatch = 16;  // loads on the way at once
    double sum = 0.0;
    for (int64_t first = 0; first < pools.chunks; first += kBatch) {
      int sizes[kBatch];
      float values[kBatch];
      for (int i = 0; i < kBatch; ++i) sizes[i] = first + i < pools.chunks ? pool.size(first + i) : 0;
      for (int i = 0; i < kBatch; ++i) {
        const int64_t chunk = image * pools.chunks + first + i;
        values[i] = sizes[i] > 0 ? p.chunk_sums[(chunk * p.num_classes + label) * p.channels + d] : 0.f;
      }
      for (int i = 0; i < kBatch; ++i) sum += double(values[i]);
    }
    sums[d] = sum;
  }
  select_pixels(pool, keep, memory, [&](int i, int64_t pixel) { chosen[i] = pixel; });
  sync_block();  // sums and pixels are there

  for (int64_t i = warp; i <= p.pixels_per_image; i += kSelectThreads / kWarp) {
    const int64_t row = blockIdx.x * (1 + p.pixels_per_image) + i;
    Out* out = static_cast<Out*>(p.rows) + row * p.channels;
    bool good;
    if (i > keep || size == 0) {
      good = store_row(out, p.channels, [](int64_t) { return 0.f; });
    } else if (i == 0) {
      double squares = 0.0;
      for (int64_t d = lane; d < p.channels; d += kWarp) squares += sums[d] * sums[d];
      squares = warp_sum(squares);
      // A zero or NaN sum needs no scale: store_row refuses it.
      const double to_unit = squares > 0.0 ? 1.0 / sqrt(squares) : 1.0;
      const double scale = p.normalize ? to_unit : 1.0 / double(size);
      good = store_row(out, p.channels, [&](int64_t d) { return float(sums[d] * scale); });
    } else {
      const In* pixel = static_cast<const In*>(p.map) + pixel_offset(p, image * pools.pixels + chosen[i - 1]);
      const float scale = p.normalize ? inverse_norm(warp_squares(pixel, p.channels, p.stride_channel)) : 1.f;
      good = store_row(out, p.channels,
                       [&](int64_t d) { return to_float(pixel[d * p.stride_channel]) * scale; });
    }
    if (lane == 0) p.row_labels[row] = good ? int32_t(label) : -1;
  }
}

// A ring per block: the regions or the pixels of a class. Counts what there is to write, of which the last
// `slots` stay, then places a candidate per thread and copies a row per warp.
template <class Word>
__global__ void __launch_bounds__(kWriteThreads, 4) write_kernel(WriteParams p) {
  SharedMemory shared;
  int* scan = shared.take<int>(kMaxWarps);
  int64_t* places = shared.take<int64_t>(kWriteThreads);  // where each candidate of the tile goes, or -1
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t label = blockIdx.x / 2;
  const bool of_pixels = blockIdx.x % 2 != 0;
  const int64_t slots = of_pixels ? p.pixel_slots : p.region_slots;
  if (slots == 0) return;
  int64_t* ptr = (of_pixels ? p.pixel_ptr : p.region_ptr) + label;
  int64_t* fill = (of_pixels ? p.pixel_fill : p.region_fill) + label;
  const int64_t start = (*ptr % slots + slots) % slots;  // never an address outside of the ring
  const int64_t first_slot = label * (p.region_slots + p.pixel_slots) + (of_pixels ? p.region_slots : 0);

  const int64_t per_image = of_pixels ? p.pixels_per_image : 1, candidates = p.batch * per_image;
  const auto row_of = [&](int64_t candidate) {
    const int64_t image = candidate / per_image, slot = of_pixels + candidate % per_image;
    return (image * p.num_classes + label) * (1 + p.pixels_per_image) + slot;
  };
  const auto is_good = [&](int64_t candidate) {
    return candidate < candidates && p.row_labels[row_of(candidate)] == label;
  };
  int mine = 0;
  for (int64_t candidate = thread; candidate < candidates; candidate += kWriteThreads)
    mine += is_good(candidate);
  const int64_t written = block_sum(mine, scan);

  const int64_t words = p.row_bytes / int64_t(sizeof(Word));
  int64_t before = 0;
  for (int64_t tile = 0; tile < candidates; tile += kWriteThreads) {
    const int good = is_good(tile + thread);
    int total;
    const int64_t order = before + block_scan(good, scan, total) - 1;
    places[thread] = good && order >= written - slots ? first_slot + (start + order) % slots : -1;
    sync_block();  // the warps copy other threads' candidates
    for (int i = warp; i < kWriteThreads; i += kWriteThreads / kWarp) {
      if (places[i] < 0) continue;
      const Word* row = static_cast<const Word*>(p.rows) + row_of(tile + i) * words;
      Word* key = static_cast<Word*>(p.keys) + places[i] * words;
      for (int64_t word = lane; word < words; word += kWarp) key[word] = row[word];
      if (lane == 0) p.key_labels[places[i]] = int32_t(label);
    }
    before += total;
  }
  sync_block();  // everybody has read the pointer
  if (thread == 0) {
    *ptr = (start + written) % slots;
    *fill = min(int64_t(uint64_t(*fill) + uint64_t(written)), slots);  // whatever stood there
  }
}

}  // namespace
}  // namespace pxc::cuda
