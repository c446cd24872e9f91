// Enqueue in two steps. Collect: per image and class, the mean of the normalised pixel embeddings (the
// region) and the pixels of smallest (priority, pixel), as candidate rows of a fixed shape. Write: the
// candidates that are labelled go into the rings, in image order.
//
// Each block reads a chunk of an image and writes a sum per class; chunks without any class are not read. A
// map is read once, or twice if its pixels are normalised and have more channels than a stage holds. On a
// given device the order of every sum is fixed: consecutive pixels of one class in a strip, then the strips
// of a chunk, in fp32, then the chunks, in fp64.
#pragma once

#include "pixels.cuh"
#include "pools.cuh"

namespace pxc::cuda {
namespace {

constexpr int kRegionThreads = 256;
constexpr int kMaxSlice = 1024;  // channels
constexpr int kWriteThreads = 256;

// How the blocks of collect_regions_kernel work through their chunks: in stages of a strip of pixels by a
// slice of channels.
struct RegionTile {
  int strip;            // pixels: 32, 64 or 128
  int slice;            // channels
  int unit;             // bytes that are copied at once, 16 or 4; 0: a number at a time, through registers
  bool sums_in_shared;  // the sums of all classes; else they are added up in device memory
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T of[kCount];
};

// A stage in shared memory: lines of neighbours in device memory, which are the pixels of a channel, or the
// channels of a pixel. 16 bytes of padding between the lines keep a column of them in different banks.
template <class In, bool kChannelsLast>
struct Stage {
  static constexpr int kVector = 16 / int(sizeof(In));          // numbers of 16 bytes
  static constexpr int kSquares = kChannelsLast ? 1 : kVector;  // pixels whose squares a thread adds up

  int strip, slice, pitch;

  __host__ __device__ __forceinline__ Stage(int strip, int slice)
      : strip(strip),
        slice(slice),
        pitch(((kChannelsLast ? slice : strip) + kVector - 1) / kVector * kVector + kVector) {}
  __host__ __device__ __forceinline__ int numbers() const { return (kChannelsLast ? strip : slice) * pitch; }
  // The share of a thread that takes `each` neighbouring pixels, and of their channels every parts-th.
  struct Share {
    int pixel, part, parts;
  };
  __device__ __forceinline__ Share share(int each) const {
    const int thread = int(threadIdx.x), groups = strip / each, parts = kRegionThreads / groups;
    if (kChannelsLast) return {thread / parts * each, thread % parts, parts};
    return {thread % groups * each, thread / groups, parts};
  }
  __device__ __forceinline__ int place(int channel, int pixel) const {
    return kChannelsLast ? pixel * pitch + channel : channel * pitch + pixel;
  }
};

// The class that a pixel of the strip counts for, and its weight.
struct alignas(8) Weight {
  int label;  // -1: nothing
  float weight;
};

// One block's pixels.
template <class In>
struct RegionChunk {
  const In* map;  // of its image
  int64_t first;  // pixel of the image
  int size;       // pixels

  __device__ __forceinline__ const In* address_of(const CollectParams& p, int i) const {
    const uint32_t pixel = uint32_t(first) + uint32_t(i), width = uint32_t(p.width);
    return map + pixel / width * p.stride_row + pixel % width * p.stride_column;
  }
};

// Starts copying a stage, or copies it if unit is 0; pixels past the last are zeros.
template <class In, bool kChannelsLast>
__device__ __forceinline__ void load_stage(const CollectParams& p, const RegionTile& tile,
                                           const RegionChunk<In>& chunk, int first_pixel,
                                           int64_t first_channel, In* staged) {
  const Stage<In, kChannelsLast> stage(tile.strip, tile.slice);
  const int channels = int(min(int64_t(tile.slice), p.channels - first_channel));
  const In* from = chunk.map + first_channel * p.stride_channel;
  const int of_unit = max(tile.unit / int(sizeof(In)), 1);  // numbers
  const auto [pixel, part, parts] = stage.share(kChannelsLast ? 1 : of_unit);
  const bool inside = first_pixel + pixel < chunk.size;
  if (inside) from += chunk.address_of(p, first_pixel + pixel) - chunk.map;
  if (tile.unit == 0) {
    constexpr int kInFlight = 16;  // loads of a thread at once, or memory would idle
    const int present = inside ? channels : 0;
    for (int first = part; first < channels; first += parts * kInFlight) {
      In values[kInFlight];
      for (int i = 0; i < kInFlight; ++i) {
        const int channel = first + i * parts;
        values[i] = channel < present ? from[channel * p.stride_channel] : In{};
      }
      for (int i = 0; i < kInFlight; ++i) {
        const int channel = first + i * parts;
        if (channel < channels) staged[stage.place(channel, pixel)] = values[i];
      }
    }
    return;
  }
  const int each = kChannelsLast ? of_unit : 1;  // channels of a unit
  for (int channel = part * each; channel < channels; channel += parts * each) {
    In* to = staged + stage.place(channel, pixel);
    const In* source = inside ? from + channel * p.stride_channel : chunk.map;
    if (tile.unit == 16) {
      cp_async_16(to, source, inside ? 16 : 0);
    } else {
      cp_async_4(to, source, inside ? 4 : 0);
    }
  }
}

// Adds the squares of a thread's share of a stage: every parts-th channel of kSquares pixels.
template <class In, bool kChannelsLast>
__device__ __forceinline__ void add_squares(const Stage<In, kChannelsLast>& stage, const In* staged,
                                            int channels,
                                            float (&squares)[Stage<In, kChannelsLast>::kSquares]) {
  constexpr int kSquares = Stage<In, kChannelsLast>::kSquares;
  const auto [pixel, part, parts] = stage.share(kSquares);
  for (int channel = part; channel < channels; channel += parts) {
    const Vector<In, kSquares> values =
        *reinterpret_cast<const Vector<In, kSquares>*>(staged + stage.place(channel, pixel));
#pragma unroll
    for (int i = 0; i < kSquares; ++i) {
      const float value = to_float(values.of[i]);
      squares[i] += value * value;
    }
  }
}

// sums[label][channel] += the weighted pixels of a strip; thread d takes channel d. The sum of a run of
// pixels of one class stays in a register.
template <class In, bool kChannelsLast>
__device__ __forceinline__ void add_strip(const Stage<In, kChannelsLast>& stage, const In* staged,
                                          const Weight* weights, int channels, float* sums, int64_t stride) {
  constexpr int kBatch = 8, kVector = kChannelsLast ? 1 : Stage<In, kChannelsLast>::kVector;
  for (int d = int(threadIdx.x); d < channels; d += kRegionThreads) {
    float run = 0.f;
    int label = -1;
    for (int first = 0; first < stage.strip; first += kBatch) {
      Vector<In, kVector> values[kBatch / kVector];
      Weight of[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i += kVector) {
        values[i / kVector] =
            *reinterpret_cast<const Vector<In, kVector>*>(staged + stage.place(d, first + i));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) of[i] = weights[first + i];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (of[i].label != label) {
          if (label >= 0) sums[label * stride + d] += run;
          run = 0.f;
          label = of[i].label;
        }
        // Rounded, so that opposite pixels add up to 0.
        run += rounded_product(to_float(values[i / kVector].of[i % kVector]), of[i].weight);
      }
    }
    if (label >= 0) sums[label * stride + d] += run;
  }
}

// Sums of the normalised pixels of each class, a block per chunk. Where copies are asynchronous, the next
// stage is loaded while one is summed. A norm needs all channels: if a stage does not hold them all, each
// strip is read twice, the second time from a cache.
template <class In, bool kChannelsLast>
__global__ void __launch_bounds__(kRegionThreads, 2)
    collect_regions_kernel(CollectParams p, Pools pools, RegionTile tile) {
  using Stage = pxc::cuda::Stage<In, kChannelsLast>;
  const int thread = int(threadIdx.x);
  const int64_t image = blockIdx.x / pools.chunks, first = blockIdx.x % pools.chunks * kChunk;
  const int32_t* starts = pools.starts + int64_t(blockIdx.x) * (pools.pools + 1);
  if (starts[pools.pools] == 0) return;  // no pixel has a class
  const int64_t classes_by_channels = p.num_classes * p.channels;
  float* chunk_sums = p.chunk_sums + int64_t(blockIdx.x) * classes_by_channels;

  const Stage stage(tile.strip, tile.slice);
  SharedMemory shared;
  In* both_staged = shared.take<In>(2 * stage.numbers());
  const auto staged = [&](int i) { return both_staged + i % 2 * stage.numbers(); };
  float* all_squares = shared.take<float>(kRegionThreads * Stage::kSquares);  // [parts, strip]
  Weight* weights = shared.take<Weight>(tile.strip);
  float* sums = tile.sums_in_shared ? shared.take<float>(classes_by_channels) : chunk_sums;
  const RegionChunk<In> chunk = {
      .map = static_cast<const In*>(p.map) + image * p.stride_batch,
      .first = first,
      .size = int(min(int64_t(kChunk), pools.pixels - first)),
  };
  const auto for_each_sum = [&](const auto& visit) {
    for (int64_t label = 0; label < p.num_classes; ++label) {
      if (starts[label] == starts[label + 1]) continue;
      for (int64_t d = thread; d < p.channels; d += kRegionThreads) visit(label * p.channels + d);
    }
  };

  const int slices = int((p.channels + tile.slice - 1) / tile.slice);
  // The first stages of a strip are for its norms, the last for the sums; the weights are ready before the
  // first sum.
  const int stages_of_strip = slices == 1 || !p.normalize ? slices : 2 * slices;
  const int weighing_stage = p.normalize ? slices - 1 : 0;
  const int strips = (chunk.size + tile.strip - 1) / tile.strip, stages = strips * stages_of_strip;
  const auto load = [&](int i) {
    if (i < stages) {
      load_stage<In, kChannelsLast>(p, tile, chunk, i / stages_of_strip * tile.strip,
                                    int64_t(i % stages_of_strip % slices) * tile.slice, staged(i));
    }
    cp_async_commit();
  };
  load(0);
  load(1);
  for_each_sum([&](int64_t i) { sums[i] = 0.f; });

  float squares[Stage::kSquares] = {};
  for (int i = 0; i < stages; ++i) {
    const int strip = i / stages_of_strip * tile.strip, slice = i % stages_of_strip % slices;
    const int channels = int(min(int64_t(tile.slice), p.channels - int64_t(slice) * tile.slice));
    const int of_strip = i % stages_of_strip;
    const bool of_norms = p.normalize && of_strip < slices, of_sums = of_strip >= stages_of_strip - slices;
    const bool weighs = of_strip == weighing_stage;
    int label = -1;  // loaded ahead
    if (weighs && thread < tile.strip && strip + thread < chunk.size) {
      label =
          class_of(p.labels[image * pools.pixels + first + strip + thread], p.num_classes, p.ignore_index);
    }
    cp_async_wait<1>();
    sync_block();  // this stage is there, and the first time, all sums are zero
    if (of_norms) add_squares(stage, staged(i), channels, squares);
    if (weighs) {
      const auto [pixel, part, parts] = stage.share(Stage::kSquares);
#pragma unroll
      for (int j = 0; j < Stage::kSquares; ++j) {
        all_squares[part * tile.strip + pixel + j] = squares[j];
        squares[j] = 0.f;
      }
      sync_block();  // all squares are there
      if (thread < tile.strip) {
        float sum = 0.f;
        for (int i = 0; i < parts; ++i) sum += all_squares[i * tile.strip + thread];
        weights[thread] = {label, p.normalize ? inverse_norm(sum) : 1.f};
      }
      sync_block();  // and all weights
    }
    if (of_sums) {
      const int64_t first_channel = int64_t(slice) * tile.slice;
      add_strip(stage, staged(i), weights, channels, sums + first_channel, p.channels);
    }
    sync_block();  // nobody reads this stage any more
    load(i + 2);
  }
  if (!tile.sums_in_shared) return;
  for_each_sum([&](int64_t i) { chunk_sums[i] = sums[i]; });
}

// Stores value(d) for all channels, or zeros if the stored row's norm would be zero or not finite; a warp
// calls it.
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

// The candidates of one class in one image, by one block: first all threads sum the chunks and select the
// pixels, then each warp makes one row at a time.
template <class In, class Out>
__global__ void __launch_bounds__(kSelectThreads, 4) collect_rows_kernel(CollectParams p, Pools pools) {
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
    Out* out = static_cast<Out*>(p.rows.data) + row * p.channels;
    bool good;
    if (i > keep || size == 0) {
      good = store_row(out, p.channels, [](int64_t) { return 0.f; });
    } else if (i == 0) {
      double squares = 0.0;
      for (int64_t d = lane; d < p.channels; d += kWarp) squares += sums[d] * sums[d];
      squares = warp_sum(squares);
      // A zero or NaN sum needs no scale: store_row rejects it.
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

// A ring per block: the regions or the pixels of a class. Counts the rows to write, of which the last `slots`
// are kept, then places one candidate per thread and copies one row per warp.
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
    *fill = min(int64_t(uint64_t(*fill) + uint64_t(written)), slots);  // whatever the counter held
  }
}

}  // namespace
}  // namespace pxc::cuda
