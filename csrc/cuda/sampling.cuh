// Hard-anchor sampling in three launches: sort the pixels of each chunk into pools, plan how many anchors
// each pool gives, select them. The rules are numbered as in `backends/reference.py`, which states them in
// full.
#pragma once

#include "pools.cuh"

namespace pxc::cuda {
namespace {

constexpr int kPlanThreads = 512;
enum Kind { kHard = 0, kEasy = 1, kKinds = 2 };

struct Sizes {
  int hard, easy;
};

// Some lanes of a warp that look at one pool together, one chunk per lane at a time; the other lanes look at
// other pools.
struct Team {
  int lanes, lane;

  // Enough lanes that each has at most eight chunks, whose loads are then in flight at once; or the whole
  // warp.
  __device__ __forceinline__ static Team of(int64_t chunks) {
    int lanes = 1;
    while (lanes < kWarp && lanes * 8 < chunks) lanes *= 2;
    return {lanes, int(threadIdx.x) % lanes};
  }
};

// Pixels of one class in one image. A whole warp calls it, as its teams exchange their findings at the same
// time.
__device__ __forceinline__ Sizes sizes_of(const Pool& hard, const Team& team) {
  Sizes sizes = {0, 0};
#pragma unroll 8
  for (int64_t chunk = team.lane; chunk < hard.chunks; chunk += team.lanes) {
    const int32_t* starts = hard.starts + chunk * hard.stride;
    sizes.hard += starts[kEasy] - starts[kHard];
    sizes.easy += starts[kKinds] - starts[kEasy];
  }
  for (int lanes = team.lanes / 2; lanes > 0; lanes /= 2) {
    sizes.hard += shuffle_xor(sizes.hard, lanes);
    sizes.easy += shuffle_xor(sizes.easy, lanes);
  }
  return sizes;
}

// The first pixel in raster order of a class that has some in the image; a whole warp calls it, likewise.
__device__ __forceinline__ int64_t first_pixel(const Pool& hard, const Team& team) {
  const auto size_of = [&](int64_t chunk) {  // of both kinds
    return hard.starts[chunk * hard.stride + kKinds] - hard.first(chunk);
  };
  int chunk = team.lane;
  while (chunk < hard.chunks && size_of(chunk) == 0) chunk += team.lanes;
  for (int lanes = team.lanes / 2; lanes > 0; lanes /= 2) chunk = min(chunk, shuffle_xor(chunk, lanes));
  int first = INT32_MAX;  // an image has no more pixels
  const int size = chunk < hard.chunks ? size_of(chunk) : 0;
#pragma unroll 8
  for (int i = team.lane; i < size; i += team.lanes) {
    first = min(first, int(hard.segment(chunk)[i] & 0xffffffffu));
  }
  for (int lanes = team.lanes / 2; lanes > 0; lanes /= 2) first = min(first, shuffle_xor(first, lanes));
  return first;
}

// Rules 2 to 4 and the order of 6, by one block: what each pool keeps and where it goes. There are few pools,
// and the steps below need all of them. Pairs are numbered in the order of their rows: by class, then by
// image.
__global__ void __launch_bounds__(kPlanThreads, 1) sampling_plan_kernel(SamplingParams p, Pools pools) {
  SharedMemory shared;
  const SelectMemory memory(shared);
  const int thread = int(threadIdx.x);
  const int64_t pairs = p.batch * p.num_classes;
  const auto hard_pool = [&](int64_t pair) {
    return pool_of(pools, pair % p.batch, pair / p.batch * kKinds + kHard);
  };
  // Until the last step, pool_keep holds the size of each pool; then, how many of its pixels are kept.
  const auto size = [&](int64_t pair, Kind kind) { return int64_t(p.pool_keep[pair * kKinds + kind]); };
  const auto eligible = [&](int64_t pair) {
    const int64_t both = size(pair, kHard) + size(pair, kEasy);
    return both > 0 && both >= p.min_pixels;
  };
  const Team team = Team::of(pools.chunks);
  const int teams = kPlanThreads / team.lanes;
  // visit(pair, whether this thread writes the result)
  const auto for_each_pair = [&](const auto& visit) {
    for (int64_t first = 0; first < pairs; first += teams) {
      const int64_t pair = first + thread / team.lanes;
      visit(min(pair, pairs - 1), pair < pairs && team.lane == 0);
    }
  };
  int found = 0;
  for_each_pair([&](int64_t pair, bool writes) {
    const Sizes sizes = sizes_of(hard_pool(pair), team);
    if (!writes) return;
    p.pool_keep[pair * kKinds + kHard] = sizes.hard;
    p.pool_keep[pair * kKinds + kEasy] = sizes.easy;
    found += eligible(pair);
  });
  const int64_t total = block_sum(found, memory.sums);  // after its barriers all threads see the sizes
  const int64_t views = max(int64_t(1), min(p.max_samples / max(total, int64_t(1)), p.max_views));

  uint64_t threshold = ~uint64_t(0);
  if (total > p.max_samples) {  // rule 3
    for_each_pair([&](int64_t pair, bool writes) {
      const int64_t image = pair % p.batch, label = pair / p.batch;
      const int64_t pixel = first_pixel(hard_pool(pair), team);
      if (!writes) return;
      const uint64_t place = uint64_t(image * p.num_classes + label);
      p.pair_keys[pair] = eligible(pair)
                              ? unsigned_priority(p.priority[image * p.pixels + pixel]) << 32 | place
                              : ~uint64_t(0);
    });
    // It begins with a barrier, after which all threads see the keys.
    threshold = select_threshold(int(p.max_samples), memory, [&](const auto& visit) {
      for (int64_t pair = thread; pair < pairs; pair += kPlanThreads) visit(p.pair_keys[pair]);
    });
  }

  int64_t rows = 0;
  for (int64_t tile = 0; tile < pairs; tile += kPlanThreads) {
    const int64_t pair = tile + thread;
    int64_t take = 0, keep_hard = 0;
    if (pair < pairs && eligible(pair) && (total <= p.max_samples || p.pair_keys[pair] <= threshold)) {
      take = min(views, size(pair, kHard) + size(pair, kEasy));
      keep_hard = min(size(pair, kHard), max(take * p.hard_share >> 24, take - size(pair, kEasy)));
    }
    int in_tile;
    const int64_t row = rows + block_scan(int(take), memory.sums, in_tile) - take;
    if (pair < pairs) {
      p.pool_keep[pair * kKinds + kHard] = int32_t(keep_hard);
      p.pool_keep[pair * kKinds + kEasy] = int32_t(take - keep_hard);
      p.pool_rows[pair * kKinds + kHard] = int32_t(row);
      p.pool_rows[pair * kKinds + kEasy] = int32_t(row + keep_hard);
    }
    rows += in_tile;
  }
  if (thread == 0) *p.count = int32_t(rows);
  for (int64_t row = rows + thread; row < p.max_samples; row += kPlanThreads) {
    p.indices[row] = 0;
    p.anchor_labels[row] = -1;
  }
}

// Rules 5 and 6, a block per pool.
__global__ void __launch_bounds__(kSelectThreads) sampling_select_kernel(SamplingParams p, Pools pools) {
  SharedMemory shared;
  const PixelMemory memory(shared);
  const int64_t pair = blockIdx.x / kKinds, image = pair % p.batch, label = pair / p.batch;
  const Pool pool = pool_of(pools, image, label * kKinds + blockIdx.x % kKinds);
  const int64_t first_row = p.pool_rows[blockIdx.x];
  select_pixels(pool, p.pool_keep[blockIdx.x], memory, [&](int i, int64_t pixel) {
    p.indices[first_row + i] = image * p.pixels + pixel;
    p.anchor_labels[first_row + i] = int32_t(label);
  });
}

}  // namespace
}  // namespace pxc::cuda
