// Pools of pixels, which sampling and enqueue share: the pixels of one image that have one class and, in
// sampling, one hardness. Wanted are the pixels of each pool with the smallest (priority, pixel), in pixel
// order.
//
// Every chunk of an image is sorted by (pool, priority, pixel) on its own. Within a chunk, a pool's pixels
// therefore form one segment, best first, and whatever the chunk contributes is a prefix of it: the keys up
// to one threshold, which a radix select over all prefixes finds. All of it is integer arithmetic, so the
// outcome depends on the input alone.
#pragma once

#include "sort.cuh"

namespace pxc::cuda {
namespace {

constexpr int kChunk = kTileKeys;  // pixels
constexpr int kSelectThreads = 256;
constexpr int kMaxWarps = 32;  // of a block

struct Pools {
  const int64_t* labels;       // [B, pixels]
  const int64_t* predictions;  // [B, pixels], or null: then the hard and the easy ones are one pool
  const int32_t* priority;     // [B, pixels]
  int64_t pixels, num_classes, ignore_index;
  int64_t chunks, pools;  // of an image
  uint64_t* keys;         // [B, chunks, kChunk], (priority, pixel), sorted within each pool
  int32_t* starts;        // [B, chunks, pools + 1], where each pool's segment begins
};

// A pool of one image.
struct Pool {
  const uint64_t* keys;
  const int32_t* starts;  // of this pool in the image's first chunk
  int64_t chunks, stride;

  __device__ __forceinline__ int first(int64_t chunk) const { return starts[chunk * stride]; }
  __device__ __forceinline__ int size(int64_t chunk) const {
    return starts[chunk * stride + 1] - starts[chunk * stride];
  }
  __device__ __forceinline__ const uint64_t* segment(int64_t chunk) const {
    return keys + chunk * kChunk + first(chunk);
  }
};

__device__ __forceinline__ Pool pool_of(const Pools& p, int64_t image, int64_t pool) {
  return {
      .keys = p.keys + image * p.chunks * kChunk,
      .starts = p.starts + image * p.chunks * (p.pools + 1) + pool,
      .chunks = p.chunks,
      .stride = p.pools + 1,
  };
}

// An unsigned number in the order of the priority.
__device__ __forceinline__ uint64_t unsigned_priority(int32_t priority) {
  return uint32_t(priority) ^ 0x80000000u;
}

// The class of a pixel, or -1 if it has none.
__device__ __forceinline__ int class_of(int64_t label, int64_t num_classes, int64_t ignore_index) {
  return label >= 0 && label < num_classes && label != ignore_index ? int(label) : -1;
}

// (pool, priority, pixel of the chunk) in one number; a pixel without a class comes after every pool.
__device__ __forceinline__ uint64_t sort_key(const Pools& p, int64_t image, int64_t pixel) {
  if (pixel >= p.pixels) return ~uint64_t(0);
  const int64_t place = image * p.pixels + pixel;
  const int label = class_of(p.labels[place], p.num_classes, p.ignore_index);
  if (label < 0) return ~uint64_t(0);
  const uint64_t pool =
      p.predictions ? uint64_t(label) * 2 + (p.predictions[place] == label) : uint64_t(label);
  return pool << kPoolShift | unsigned_priority(p.priority[place]) << kTileBits | uint64_t(pixel % kChunk);
}

// Sorts a chunk.
__global__ void __launch_bounds__(kSortThreads, 1) pool_sort_kernel(Pools p) {
  SharedMemory shared;
  uint64_t* keys = shared.take<uint64_t>(kChunk);
  const int thread = int(threadIdx.x);
  const int64_t image = blockIdx.x / p.chunks, first = blockIdx.x % p.chunks * kChunk;
  for (int i = thread; i < kChunk; i += kSortThreads) keys[i] = sort_key(p, image, first + i);
  sort_tile(keys, kChunk);
  uint64_t* sorted = p.keys + int64_t(blockIdx.x) * kChunk;
  for (int i = thread; i < kChunk; i += kSortThreads) {
    sorted[i] = (keys[i] >> kTileBits & 0xffffffffu) << 32 | uint64_t(first + int64_t(keys[i] % kChunk));
  }
  int32_t* starts = p.starts + int64_t(blockIdx.x) * (p.pools + 1);
  for (int64_t pool = thread; pool <= p.pools; pool += kSortThreads) {
    starts[pool] = lower_bound(keys, 0, kChunk, uint64_t(pool) << kPoolShift);
  }
}

inline void sort_pools(const Launch& on, const char* name, const Pools& pools, int64_t batch) {
  launch(on, name, pool_sort_kernel, dim3(unsigned(batch * pools.chunks)), kSortThreads,
         shared_bytes<uint64_t>(kChunk), pools);
}

// The sum of `value` over this thread and those before it, and `total` over the block; `sums` has a place per
// warp. Shared memory that was read before the call may be overwritten after it.
__device__ __forceinline__ int block_scan(int value, int* sums, int& total) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  value = warp_scan(value);
  sync_block();  // the sums of an earlier call have been read
  if (lane == kWarp - 1) sums[warp] = value;
  sync_block();  // those of this one are there
  total = 0;
  for (int i = 0; i < int(blockDim.x) / kWarp; ++i) {
    if (i == warp) value += total;
    total += sums[i];
  }
  return value;
}

__device__ __forceinline__ int block_sum(int value, int* sums) {
  int total;
  block_scan(value, sums, total);
  return total;
}

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

// The shared memory of a selection.
struct SelectMemory {
  int* histogram;  // [kBins]
  int* found;      // [3]: the digit looked for, how many keys have a smaller one, how many have it
  int* sums;       // [kMaxWarps]

  static constexpr size_t kBytes =
      shared_bytes<int>(kBins) + shared_bytes<int>(3) + shared_bytes<int>(kMaxWarps);
  __device__ __forceinline__ explicit SelectMemory(SharedMemory& shared)
      : histogram(shared.take<int>(kBins)), found(shared.take<int>(3)), sums(shared.take<int>(kMaxWarps)) {}
};

// A bound that exactly the `keep` smallest keys do not exceed; 0 < keep <= number of keys. The next one has
// to be larger, so keys may be equal where none of them is wanted: those of pairs that are not eligible. A
// radix select from the highest digit down, which ends as soon as all keys that share a digit are wanted.
// for_each_key(visit) calls visit with this thread's share of the keys. The whole block, of at least kBins
// threads, calls it.
template <class ForEachKey>
__device__ __forceinline__ uint64_t select_threshold(int keep, const SelectMemory& memory,
                                                     const ForEachKey& for_each_key) {
  const int thread = int(threadIdx.x);
  uint64_t digits = 0, known = 0;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (thread < kBins) memory.histogram[thread] = 0;
    sync_block();  // the histogram is empty
    for_each_key([&](uint64_t key) {
      if ((key & known) == digits) atomic_add(&memory.histogram[key >> shift & (kBins - 1)], 1);
    });
    sync_block();  // and full
    const int count = thread < kBins ? memory.histogram[thread] : 0;
    int total;
    const int up_to = block_scan(count, memory.sums, total);
    if (up_to - count < keep && keep <= up_to) {  // one thread
      memory.found[0] = thread;
      memory.found[1] = up_to - count;
      memory.found[2] = count;
    }
    sync_block();  // the digit is found
    digits |= uint64_t(memory.found[0]) << shift;
    known |= uint64_t(kBins - 1) << shift;
    keep -= memory.found[1];
    if (keep == memory.found[2]) break;
  }
  return digits | ~known;
}

// The shared memory of select_pixels.
struct PixelMemory {
  SelectMemory select;
  int* counts;   // [kSelectThreads], chosen pixels of each chunk
  int* offsets;  // [kSelectThreads], chosen pixels of the chunks before it
  int* bitmaps;  // [warps, kChunk / 32], the chosen pixels of a chunk

  static constexpr size_t kBytes = SelectMemory::kBytes + 3 * shared_bytes<int>(kSelectThreads);
  __device__ __forceinline__ explicit PixelMemory(SharedMemory& shared)
      : select(shared),
        counts(shared.take<int>(kSelectThreads)),
        offsets(shared.take<int>(kSelectThreads)),
        bitmaps(shared.take<int>(kSelectThreads)) {}
};

// How many pixels a pool has; the whole block calls it.
__device__ __forceinline__ int pool_size(const Pool& pool, int* sums) {
  int size = 0;
  for (int64_t chunk = threadIdx.x; chunk < pool.chunks; chunk += blockDim.x) size += pool.size(chunk);
  return block_sum(size, sums);
}

// emit(i, pixel) for the `keep` pixels of a pool that come first by (priority, pixel); i counts them in pixel
// order. A block of kSelectThreads calls it.
template <class Emit>
__device__ __forceinline__ void select_pixels(const Pool& pool, int keep, const PixelMemory& memory,
                                              const Emit& emit) {
  constexpr int kWarps = kSelectThreads / kWarp;
  static_assert(kChunk / 32 == kWarp, "a lane holds a word of the bitmap");
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (keep == 0) return;
  const uint64_t threshold = select_threshold(keep, memory.select, [&](const auto& visit) {
    for (int64_t chunk = warp; chunk < pool.chunks; chunk += kWarps) {
      const int size = min(pool.size(chunk), keep);
      const uint64_t* keys = pool.segment(chunk);
      for (int i = lane; i < size; i += kWarp) visit(keys[i]);
    }
  });
  int emitted = 0;
  for (int64_t tile = 0; tile < pool.chunks; tile += kSelectThreads) {
    const int64_t mine = tile + thread;
    int count = 0, total;
    if (mine < pool.chunks) {
      count = min(pool.size(mine), keep);
      // ~0 has no successor, and lets every key pass.
      if (threshold != ~uint64_t(0)) count = lower_bound(pool.segment(mine), 0, count, threshold + 1);
    }
    const int up_to = block_scan(count, memory.select.sums, total);
    memory.counts[thread] = count;
    memory.offsets[thread] = emitted + up_to - count;
    sync_block();  // the warps take other threads' chunks
    for (int64_t chunk = tile + warp; chunk < min(tile + kSelectThreads, pool.chunks); chunk += kWarps) {
      const int size = memory.counts[chunk - tile];
      if (size == 0) continue;
      int* bitmap = memory.bitmaps + warp * kWarp;
      bitmap[lane] = 0;
      sync_warp();  // before others set bits in it
      const uint64_t* keys = pool.segment(chunk);
      for (int i = lane; i < size; i += kWarp) {
        const int pixel = int(keys[i] % kChunk);  // each once, so adding sets the bit
        atomic_add(&bitmap[pixel / 32], int(1u << pixel % 32));
      }
      sync_warp();  // all bits are set
      unsigned word = unsigned(bitmap[lane]);
      int place = memory.offsets[chunk - tile] + warp_scan(count_bits(word)) - count_bits(word);
      for (; word != 0; word &= word - 1) {
        emit(place++, chunk * kChunk + lane * 32 + lowest_bit(word));
      }
    }
    emitted += total;
  }
}

}  // namespace
}  // namespace pxc::cuda
