// Who visits what: the order of the anchors, the labels of the columns by pieces, the tiles of columns that
// matter to a block, and the tiles of anchors of one class.
#pragma once

#include <type_traits>

#include "engine.cuh"
#include "infonce_rows.cuh"
#include "sort.cuh"

namespace pxc::cuda {

enum class Pass { kNegatives, kPositives, kBackward };

// The smallest and the largest label, of those that are one; high < 0: there is none.
struct LabelRange {
  int low, high;

  __device__ __forceinline__ bool apart(LabelRange other) const {
    return high < other.low || other.high < low;
  }
  __device__ __forceinline__ bool one_class() const { return low == high; }
};

// The range of the labels >= 0 among `count` places of a side from `first` on; the whole warp calls it.
__device__ __forceinline__ LabelRange range_of_labelled(const Side& side, int64_t first, int count,
                                                        int lane) {
  LabelRange range{INT32_MAX, -1};
  for (int i = lane; i < count; i += kWarp) {
    const int label = first + i < side.count ? side.labels[first + i] : -1;
    if (label >= 0) range = {min(range.low, label), max(range.high, label)};
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    range.low = min(range.low, shuffle_xor(range.low, lanes));
    range.high = max(range.high, shuffle_xor(range.high, lanes));
  }
  return range;
}

// Of a piece of the columns, memory holds the smallest and the largest label: (low, high), or (~low, high) if
// some of the piece have none.
__device__ __forceinline__ int lowest_label(int2 of_piece) {
  return of_piece.x < 0 ? ~of_piece.x : of_piece.x;
}

// The column tiles of one split that a block has to visit. A split has every `splits`-th tile, so that the
// tiles of one class spread over all splits. A warp looks at 32 tiles at a time; all warps find the same.
template <Pass kPass, class Tile>
class Walk {
 public:
  __device__ __forceinline__ Walk(const int32_t* ranges, int64_t num_columns, LabelRange own, int split,
                                  int splits, int lane)
      : ranges_(reinterpret_cast<const int2*>(ranges)),
        num_ranges_(int((num_columns + Tile::S::kColumns - 1) / Tile::S::kColumns)),
        base_(split),
        splits_(splits),
        own_(own),
        lane_(lane) {}

  // The next tile; its index is -1 past the last.
  __device__ __forceinline__ Visit next() {
    while (visit_ == 0) {
      if (own_.high < 0 || base_ * Tile::kPieces >= num_ranges_) return {-1, false, false};
      const int first = (base_ + lane_ * splits_) * Tile::kPieces;
      LabelRange range{INT32_MAX, -1};
      bool unlabelled = false;
#pragma unroll
      for (int piece = first; piece < first + Tile::kPieces; ++piece) {
        const int2 of_piece = piece < num_ranges_ ? ranges_[piece] : make_int2(~INT32_MAX, -1);
        range = {min(range.low, lowest_label(of_piece)), max(range.high, of_piece.y)};
        unlabelled |= of_piece.x < 0;
      }
      visit_ = ballot(concerns(range));
      mixed_ = ballot(unlabelled || !range.apart(own_));
      unlabelled_ = ballot(unlabelled);
      base_ += kWarp * splits_;
    }
    const int bit = lowest_bit(visit_);
    visit_ &= visit_ - 1;
    return {base_ - (kWarp - bit) * splits_, bool(mixed_ >> bit & 1), bool(unlabelled_ >> bit & 1)};
  }

 private:
  __device__ __forceinline__ bool concerns(LabelRange range) const {
    if (range.high < 0) return false;
    if (kPass == Pass::kPositives) return !range.apart(own_);
    if (kPass == Pass::kBackward) return true;
    return !(range.one_class() && own_.one_class() && range.low == own_.low);  // all of it positive
  }

  const int2* ranges_;
  int num_ranges_, base_, splits_;  // base_: the first tile that has not been looked at
  LabelRange own_;
  int lane_;
  unsigned visit_ = 0, mixed_ = 0, unlabelled_ = 0;
};

// Starts copying the labels of a tile's columns to `labels`; columns past the last get -1.
template <int kCount>
__device__ __forceinline__ void load_labels(int* labels, const Side& side, int64_t first) {
  if (int(threadIdx.x) >= kCount) return;
  if (first + threadIdx.x < side.count) {
    cp_async_4(labels + threadIdx.x, side.labels + first + threadIdx.x, 4);
  } else {
    labels[threadIdx.x] = -1;
  }
}

// --- the order of visits ---

constexpr int kOrderThreads = kSortThreads;

// The labels of every piece of the columns; places past the last count as unlabelled. A block looks at
// kOrderThreads labels, and a warp at 32, which are one piece or several.
template <int kPiece>
__device__ __forceinline__ void find_ranges(const int32_t* labels, int64_t count, int32_t* ranges,
                                            int64_t block) {
  static_assert(kPiece <= kWarp, "a piece is read by one warp");
  const int64_t place = block * kOrderThreads + threadIdx.x;
  const int label = place < count ? max(labels[place], -1) : -1;
  int low = label < 0 ? INT32_MAX : label, high = label, least = label;
  for (int lanes = kPiece / 2; lanes > 0; lanes /= 2) {
    low = min(low, shuffle_xor(low, lanes));
    high = max(high, shuffle_xor(high, lanes));
    least = min(least, shuffle_xor(least, lanes));
  }
  if (place % kPiece == 0 && place < count) {
    reinterpret_cast<int2*>(ranges)[place / kPiece] = make_int2(least < 0 ? ~low : low, high);
  }
}

// An anchor's part of ds, eq. (5): push exp2(score - neg_lse_log2) for negatives, -pull sigma for positives.
struct alignas(16) Factors {
  float neg_lse_log2, push, pull;
  float label_bits;  // an integer among floats would split the load of all four

  __device__ __forceinline__ int label() const { return int(float_bits(label_bits)); }
};

// An anchor's range, if mined: negatives take part from neg_min on, positives below pos_max.
struct alignas(8) Bounds {
  float neg_min, pos_max;
};

template <class Params>
constexpr bool kBackward = std::is_base_of_v<InfonceBackwardParams, Params>;

// Records that an anchor is the `place`-th to be visited, and for the backward its factors.
template <class Params>
__device__ __forceinline__ void visit_anchor(const Params& p, int64_t place, int64_t anchor) {
  const int label = max(p.anchor_labels[anchor], -1);
  p.order[place] = int32_t(anchor);
  p.sorted_labels[place] = label;
  if constexpr (kBackward<Params>) {
    // Without negatives sigma is 0: a log-sum-exp of +inf and factors of 0 give that without a special case.
    const bool alone = label < 0 || p.neg_lse[anchor] == -INFINITY;
    const float pull = alone ? 0.f : p.grad_scale[anchor];
    reinterpret_cast<Factors*>(p.factors)[place] = {
        .neg_lse_log2 = alone ? INFINITY : p.neg_lse[anchor] * kLog2E,
        .push = alone ? 0.f : pull * p.pos_weight[anchor],
        .pull = pull,
        .label_bits = bits_float(uint32_t(label)),
    };
    if constexpr (kMined<Params>) {
      reinterpret_cast<Bounds*>(p.bounds)[place] = {
          .neg_min = as_score(p, p.neg_min[anchor]),
          .pos_max = as_score(p, p.pos_max[anchor]),
      };
    }
  }
}

// Times which scores are in units of log2.
template <class Params>
__device__ __forceinline__ void find_scale(const Params& p) {
  const float scale = kLog2E / p.temperature;
  *p.score_scale = fmaxf(scale * unscale_of_anchors(p) * unscale_of_keys(p), kSmallestScale);
}

// What the sort of the anchors finds of the keys as well, for keys that only one pass meets.
template <class Params, int kPiece>
__global__ void __launch_bounds__(kOrderThreads) infonce_keys_kernel(Params p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) find_scale(p);
  find_ranges<kPiece>(p.key_labels, p.num_keys, p.label_ranges, blockIdx.x);
}

// Sorts the anchors by (label, index), those without a label last: all of them if they make one tile, else by
// tiles. The blocks after those find the ranges of the keys' labels. One thread computes the scale of the
// scores.
template <class Params, int kPiece>
__global__ void __launch_bounds__(kOrderThreads, 1) infonce_order_kernel(Params p) {
  const int64_t tiles = (p.num_anchors + kTileKeys - 1) / kTileKeys;
  if (blockIdx.x >= tiles) {
    return find_ranges<kPiece>(p.key_labels, p.num_keys, p.label_ranges, blockIdx.x - tiles);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) find_scale(p);
  SharedMemory memory;
  const auto rank_of_label = [&p](int64_t anchor) {
    const int label = p.anchor_labels[anchor];
    return label < 0 ? 0x80000000u : unsigned(label);
  };
  sort_numbers(memory, blockIdx.x, p.num_anchors, p.sort_keys, rank_of_label,
               [&p](int64_t place, uint64_t, int64_t anchor) { visit_anchor(p, place, anchor); });
}

// Puts the anchors of several tiles where they belong, a warp per anchor.
template <class Params>
__global__ void __launch_bounds__(kOrderThreads) infonce_rank_kernel(Params p, int64_t tiles) {
  const int64_t place = (int64_t(blockIdx.x) * kOrderThreads + threadIdx.x) / kWarp;
  if (place >= p.num_anchors) return;
  emit_ranked(p.sort_keys, tiles, place,
              [&p](int64_t rank, uint64_t, int64_t anchor) { visit_anchor(p, rank, anchor); });
}

// The largest weight that an anchor may have in the backward. No sigma is larger than their sum S, except
// with a log-sum-exp that is of other keys: so from below.
__device__ __forceinline__ float largest_weight(const Factors& anchor) {
  constexpr float kSmallestSum = 0x1p-10f;
  return anchor.push == 0.f ? 0.f : fmaxf(fabsf(anchor.push), fabsf(anchor.pull) * kSmallestSum);
}

// What is known of the anchors once they are in order: the ranges of their labels as columns, and for the
// backward each block's largest weight.
template <class Params, int kPiece>
__global__ void __launch_bounds__(kOrderThreads) infonce_anchors_kernel(Params p) {
  find_ranges<kPiece>(p.sorted_labels, p.num_anchors, p.label_ranges, blockIdx.x);
  if constexpr (kBackward<Params>) {
    if (p.weight_peaks == nullptr) return;
    SharedMemory memory;
    float* warps = memory.take<float>(kOrderThreads / kWarp);
    const int64_t place = int64_t(blockIdx.x) * kOrderThreads + threadIdx.x;
    const Factors* factors = reinterpret_cast<const Factors*>(p.factors);
    const float largest =
        block_max<kOrderThreads>(place < p.num_anchors ? largest_weight(factors[place]) : 0.f, warps);
    if (threadIdx.x == 0) p.weight_peaks[blockIdx.x] = largest;
  }
}

// Scratch of the two functions below, in ints: 128 bytes, so that the arrays after it stay aligned. Each
// array in it starts at a multiple of 16 bytes: the compiler reads 16 bytes at a time in the loops over the
// warps before, and must not read what other warps are writing.
constexpr int kClassTileScratch = 32, kTilesOfWarps = 8, kFoundTile = 16, kSpansOfWarps = 20;

// Whether the columns are more or less in the order of their classes, judged by how far apart the labels of a
// piece are, on average over one piece per thread. The whole block calls it.
template <int kThreads>
__device__ __forceinline__ bool are_grouped(const int32_t* ranges, int pieces, int* scratch) {
  constexpr int kMostApart = 4, kFar = 1 << 16;
  int apart = 0;
  if (pieces > 0) {
    const int2 range = reinterpret_cast<const int2*>(ranges)[int64_t(threadIdx.x) * pieces / kThreads];
    apart = range.y < 0 ? 0 : min(range.y - lowest_label(range), kFar);
  }
  apart = warp_sum(apart);
  if (threadIdx.x % kWarp == 0) scratch[kSpansOfWarps + threadIdx.x / kWarp] = apart;
  sync_block();  // the spans of all warps are there
  int all = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) all += scratch[kSpansOfWarps + warp];
  return all <= kMostApart * kThreads;
}

// Anchors that follow each other in the order of visits.
struct ClassTile {
  int first, count;  // none: -1
};

// Finds one of the tiles of up to kBlockA labelled anchors in the sorted labels: number choose(how many there
// are), or none if that is past the last. If the keys are grouped, a new tile begins with every class. The
// whole block calls it.
template <int kBlockA, int kThreads, class Choose>
__device__ __forceinline__ ClassTile find_class_tile(const int32_t* labels, int count, bool grouped,
                                                     int* scratch, Choose choose) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kTilesOfWarps, "they share the scratch");
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int share = (count + kThreads - 1) / kThreads;
  const int begin = min(int(threadIdx.x) * share, count), end = min(begin + share, count);
  const auto begins_class = [&](int i) { return i == 0 || (grouped && labels[i] != labels[i - 1]); };

  // The beginning of the class that is current where a thread's share starts.
  int start = 0;
  for (int i = begin; i < end; ++i) {
    if (begins_class(i)) start = i;
  }
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = shuffle_up(start, lanes);
    if (lane >= lanes) start = max(start, before);
  }
  if (lane == kWarp - 1) scratch[warp] = start;
  const int of_lane_before = shuffle_up(start, 1);
  start = lane == 0 ? 0 : of_lane_before;
  sync_block();  // the last beginnings of all warps are there
  for (int other = 0; other < warp; ++other) start = max(start, scratch[other]);

  // How many tiles begin in the shares before.
  const auto begins_tile = [&](int i) {
    if (begins_class(i)) start = i;
    return labels[i] >= 0 && (i - start) % kBlockA == 0;
  };
  const int start_of_share = start;
  int tiles = 0;
  for (int i = begin; i < end; ++i) tiles += begins_tile(i);
  int before = warp_scan(tiles);
  if (lane == kWarp - 1) scratch[kTilesOfWarps + warp] = before;
  before -= tiles;
  if (threadIdx.x == 0) scratch[kFoundTile] = -1;
  sync_block();  // the tiles of all warps are there
  int all = 0;
  for (int other = 0; other < kWarps; ++other) {
    if (other == warp) before += all;
    all += scratch[kTilesOfWarps + other];
  }
  const int tile = choose(all);
  if (before <= tile && tile < before + tiles) {
    start = start_of_share;
    for (int i = begin, number = before; i < end; ++i) {
      if (begins_tile(i) && number++ == tile) scratch[kFoundTile] = i;
    }
  }
  sync_block();  // the first anchor of the tile is there
  const int first = scratch[kFoundTile];
  if (first < 0) return {-1, 0};
  int length = 0;
#pragma unroll
  for (int row = 0; row < kBlockA; row += kWarp) {
    const int i = first + row + lane;
    const bool inside = row + lane < kBlockA && i < count;
    length += count_bits(ballot(inside && (grouped ? labels[i] == labels[first] : labels[i] >= 0)));
  }
  return {first, length};
}

}  // namespace pxc::cuda
