// The forward: pass 1 over the negatives, pass 2 over the positives, and the stage that adds up their splits.
#pragma once

#include "infonce_visits.cuh"

namespace pxc::cuda {

template <class Tile>
using NegativesEngine = Engine<Tile, kNegativeParts<Tile>>;

// The shared memory of a block of pass 1. It has the largest tiles, and keeps nothing but the labels of the
// columns beside them: 128 x 128 tiles of 512 bytes a row take all that an H100 has, to the byte. Mining,
// whose tiles are smaller, adds a bound of each row.
template <class Tile, bool kMined>
size_t negatives_bytes(int64_t row_stride) {
  return NegativesEngine<Tile>::bytes(row_stride) + shared_bytes<int>(2 * Tile::kBlockK) +
         (kMined ? shared_bytes<float>(Tile::kBlockA) : 0);
}

// Pass 1 over the negatives: eq. (1), and O, both as partial results of one split.
template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) infonce_fwd_negatives_kernel(Params p) {
  using Engine = NegativesEngine<Tile>;
  SharedMemory memory;
  const Side anchors = anchors_of<Tile>(p), keys = keys_of<Tile>(p);
  const Engine engine(memory, anchors, keys, int(blockIdx.x) * Tile::kBlockA);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  const float scale = *p.score_scale;
  const bool with_grad = p.negative_parts != nullptr;
  [[maybe_unused]] float* lowest = nullptr;  // the score of each row from which on a negative takes part
  if constexpr (kMined<Params>) {
    lowest = memory.take<float>(Tile::kBlockA);
    if (int(threadIdx.x) < min(anchors.count - engine.first_row, Tile::kBlockA)) {
      lowest[threadIdx.x] = as_score(p, p.neg_min[anchors.order[engine.first_row + threadIdx.x]]);
    }  // the engine's first barrier shows them to all
  }

  typename Engine::PerRow shift, sum = {};
  each_row<Tile>([&](int f, int half) { shift[f][half] = -INFINITY; });
  typename Engine::Output output = {};

  const LabelRange own = range_of_labelled(anchors, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<Pass::kNegatives, Tile> walk(p.label_ranges, keys.count, own, int(blockIdx.y), int(gridDim.y),
                                    engine.lane);
  bool visited = false;
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool mixed, unsigned) {
        visited = true;
        typename Engine::Scores scores;
        engine.template multiply_rows<2 / Tile::kPlanes>(scores, stage);
        if (mixed) {
          each_row<Tile>([&](int f, int half) {
            const int row_label = label_at(anchors, engine.first_row + engine.local_row(f, half));
            each_score<Tile>([&](int n, int e) {
              const int label = key_labels[stage * Tile::kBlockK + engine.local_column(n) + e];
              if (label < 0 || label == row_label) scores[f][n][2 * half + e] = -INFINITY;
            });
          });
        }
        if constexpr (kMined<Params>) {
          each_row<Tile>([&](int f, int half) {
            const float bound = lowest[engine.local_row(f, half)];
            each_score<Tile>([&](int n, int e) {
              float& score = scores[f][n][2 * half + e];
              if (score < bound) score = -INFINITY;
            });
          });
        }

        // The largest score of each row, first among this warp's columns, then among all.
        each_row<Tile>([&](int f, int half) {
          float highest = -INFINITY;
          each_score<Tile>([&](int n, int e) { highest = fmaxf(highest, scores[f][n][2 * half + e]); });
          highest = fmaxf(highest, shuffle_xor(highest, 1));
          highest = fmaxf(highest, shuffle_xor(highest, 2));
          if (engine.quad == 0)
            engine.exchange[engine.col_warp * Tile::kBlockA + engine.local_row(f, half)] = highest;
        });
        engine.sync_row_warps();  // the maxima of all column warps are there

        bool moved = false;
        typename Engine::PerRow rescale;
        each_row<Tile>([&](int f, int half) {
          float highest = -INFINITY;
#pragma unroll
          for (int warp = 0; warp < Tile::kColWarps; ++warp) {
            highest = fmaxf(highest, engine.exchange[warp * Tile::kBlockA + engine.local_row(f, half)]);
          }
          highest = rounded_product(highest, scale);  // as the weights' scores are
          rescale[f][half] = 1.f;
          // Exact for numbers that are so near; their sum with the slack is not, from 2^24 on.
          if (highest - shift[f][half] >= kSlack) {
            rescale[f][half] = exp2_approx(shift[f][half] - highest);
            shift[f][half] = highest;
            sum[f][half] *= rescale[f][half];
            moved = true;
          }
          // A row that has met no negative yet has no shift: any will do, its weights are 0.
          const float base = shift[f][half] == -INFINITY ? 0.f : shift[f][half] - kWeightBias<Tile>;
          float sum_of_tile = 0.f;
          each_score<Tile>([&](int n, int e) {
            float& score = scores[f][n][2 * half + e];
            score = exp2_approx(rounded_product(score, scale) - base);
            sum_of_tile += score;
          });
          sum[f][half] += sum_of_tile;
        });
        if (!with_grad) return;
        if (ballot(moved) != 0) {
          each_output<Tile>([&](int f, int n, int i) { output[f][n][i] *= rescale[f][i / 2]; });
        }
        engine.store_weights(scores);
        engine.accumulate(output, stage);
      });

  const int64_t part = int64_t(blockIdx.y) * p.num_anchors + engine.first_row;
  const float sum_of_row = engine.sum_over_row(sum);
  const int rows_left = min(anchors.count - engine.first_row, Tile::kBlockA);
  if (int(threadIdx.x) < rows_left) p.sum_parts[part + threadIdx.x] = sum_of_row;
  if (engine.quad == 0 && engine.col_warp == 0) {
    each_row<Tile>([&](int f, int half) {
      const int row = engine.local_row(f, half);
      if (row < rows_left) p.shift_parts[part + row] = shift[f][half];
    });
  }
  if (with_grad && visited) {  // else every shift is -inf, and nobody reads the output
    float* to = p.negative_parts + int64_t(blockIdx.y) * p.num_anchors * p.part_channels;
    engine.write(output, to, nullptr, p.part_channels, p.part_channels);
  }
}

// All splits of an anchor's negatives, combined in a fixed order: the shift, and the sum of exp2(score -
// shift).
struct Negatives {
  float shift, sum;

  // Eq. (1) in units of log2. Without negatives the sum is 0, and this is -inf.
  __device__ __forceinline__ float lse_log2(float weight_bias) const {
    return shift + log2f(sum) - weight_bias;
  }
};

// kLanes neighbours share the splits of a row, and all get the result. The whole warp calls it.
template <int kLanes>
__device__ __forceinline__ Negatives combine_negatives(const InfonceForwardParams& p, int64_t row, int lane) {
  Negatives all{-INFINITY, 0.f};
#pragma unroll 4
  for (int64_t split = lane; split < p.splits; split += kLanes) {
    all.shift = fmaxf(all.shift, p.shift_parts[split * p.num_anchors + row]);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    all.shift = fmaxf(all.shift, shuffle_xor(all.shift, lanes));
  }
#pragma unroll 4
  for (int64_t split = lane; split < p.splits; split += kLanes) {
    const float shift = p.shift_parts[split * p.num_anchors + row];
    const float sum = p.sum_parts[split * p.num_anchors + row];
    // A maximum ignores NaN: a split without a shift has met no negative, or only NaN, which its sum then is.
    all.sum += shift == -INFINITY ? sum : sum * exp2_approx(shift - all.shift);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) all.sum += shuffle_xor(all.sum, lanes);
  return all;
}

// An anchor of a block of pass 2: the label of its positives, the key that is the anchor itself (-1: none),
// eq. (1), and the scale, which is the same for all but would take a register elsewhere.
struct alignas(16) RowOfPositives {
  int label, excluded;
  float neg_lse_log2, scale;
};

// A piece of work for a block of pass 2: a tile of anchors, and one of the splits of its walk.
struct PositivesItem {
  int number, split, splits;
};

template <class Tile>
using PositivesEngine = Engine<Tile, kWeightParts<Tile>>;

// The shared memory of a block of pass 2, mined or not.
template <class Tile>
size_t positives_bytes(int64_t row_stride) {
  return PositivesEngine<Tile>::bytes(row_stride) + shared_bytes<int>(kClassTileScratch) +
         shared_bytes<int>(2 * Tile::kBlockK) + shared_bytes<RowOfPositives>(Tile::kBlockA) +
         shared_bytes<float>(Tile::kBlockA);  // the last for a bound of each row
}

// Finds those of the anchors of a block; the whole block calls it, with some threads for each row.
template <class Tile>
__device__ __forceinline__ void find_rows_of_positives(const InfonceForwardParams& p, const Side& anchors,
                                                       int first_row, RowOfPositives* rows) {
  constexpr int kLanes = Tile::kThreads / Tile::kBlockA;
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "they are lanes of one warp");
  const int local = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int row = first_row + local;
  const int label = label_at(anchors, row);
  int excluded = -1;
  if (p.exclude_self && label >= 0) excluded = p.keys.data == nullptr ? row : p.order[row];
  // Of a row past the last nobody uses it; the other lanes need its threads all the same.
  const Negatives negatives = combine_negatives<kLanes>(p, min(row, anchors.count - 1), lane);
  if (lane > 0) return;
  rows[local] = {
      .label = label < 0 ? INT32_MIN : label,
      .excluded = excluded,
      .neg_lse_log2 = negatives.lse_log2(kWeightBias<Tile>),
      .scale = *p.score_scale,
  };
}

// Pass 2 over anchors of one class or several and the keys of those classes, given eq. (1): eq. (2) to (4),
// and G.
template <class Tile, class Params>
__device__ __forceinline__ void add_positives(const Params& p, const ClassTile& tile,
                                              const PositivesItem& item, SharedMemory& memory) {
  Side anchors = anchors_of<Tile>(p);
  anchors.count = tile.first + tile.count;
  const Side keys = keys_of<Tile>(p);
  const PositivesEngine<Tile> engine(memory, anchors, keys, tile.first);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  RowOfPositives* own_rows = memory.take<RowOfPositives>(Tile::kBlockA);
  const bool with_grad = p.positive_parts != nullptr;
  find_rows_of_positives<Tile>(p, anchors, engine.first_row, own_rows);
  [[maybe_unused]] float* highest = nullptr;  // the score of each row below which a positive takes part
  if constexpr (kMined<Params>) {
    highest = memory.take<float>(Tile::kBlockA);
    if (int(threadIdx.x) < min(anchors.count - engine.first_row, Tile::kBlockA)) {
      highest[threadIdx.x] = as_score(p, p.pos_max[anchors.order[engine.first_row + threadIdx.x]]);
    }
  }  // the engine's first barrier shows both to all

  typename PositivesEngine<Tile>::PerRow loss = {}, pos_weight = {};
  int count[Tile::kFragments][2] = {};
  typename PositivesEngine<Tile>::Output output = {};

  const LabelRange own{anchors.labels[tile.first], anchors.labels[anchors.count - 1]};
  Walk<Pass::kPositives, Tile> walk(p.label_ranges, keys.count, own, item.split, item.splits, engine.lane);
  bool visited = false;
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool, unsigned first_column) {
        visited = true;
        typename PositivesEngine<Tile>::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        each_row<Tile>([&](int f, int half) {
          // The sum of log(1 + odds) is log(1 + `all_odds`). Unlike 1 + odds, `all_odds` does not lose tiny
          // odds, and it stays far below the largest float, as few of a thread's scores share a row.
          static_assert(2 * Tile::kScoreCols <= 64, "a sum of odds doubles with each");
          float margins = 0.f, all_odds = 0.f, weight_of_tile = 0.f;
          const RowOfPositives own = own_rows[engine.local_row(f, half)];  // registers are short here
          [[maybe_unused]] float bound;
          if constexpr (kMined<Params>) bound = highest[engine.local_row(f, half)];
          each_score<Tile>([&](int n, int e) {
            float& score = scores[f][n][2 * half + e];
            const int column = engine.local_column(n) + e;
            bool positive = key_labels[stage * Tile::kBlockK + column] == own.label &&
                            first_column + unsigned(column) != unsigned(own.excluded);
            if constexpr (kMined<Params>) positive = positive && !(score >= bound);
            const float margin = own.neg_lse_log2 - rounded_product(score, own.scale);
            const float odds = positive ? exp2_approx(-fabsf(margin)) : 0.f;
            const float sigma = (margin >= 0.f ? 1.f : odds) * reciprocal_approx(1.f + odds);
            margins += positive ? fmaxf(margin, 0.f) : 0.f;
            all_odds += fmaf(all_odds, odds, odds);
            score = positive ? sigma * float(1 << kSigmaBias<Tile>) : 0.f;
            weight_of_tile += positive ? sigma : 0.f;
            count[f][half] += positive;
          });
          loss[f][half] += fmaf(kLn2, margins, log1pf(all_odds));
          pos_weight[f][half] += weight_of_tile;
        });
        if (!with_grad) return;
        engine.store_weights(scores);
        engine.accumulate(output, stage);
      });

  const int64_t part = int64_t(item.split) * p.num_anchors + engine.first_row;
  const float losses = engine.sum_over_row(loss), weights = engine.sum_over_row(pos_weight);
  const int counts = engine.sum_over_row(count);
  if (int(threadIdx.x) < min(anchors.count - engine.first_row, Tile::kBlockA)) {
    p.loss_parts[part + threadIdx.x] = losses;
    p.pos_weight_parts[part + threadIdx.x] = weights;
    p.pos_count_parts[part + threadIdx.x] = counts;
  }
  if (with_grad && visited) {  // else no count is above 0, and nobody reads the output
    float* to = p.positive_parts + int64_t(item.split) * p.num_anchors * p.part_channels;
    engine.write(output, to, nullptr, p.part_channels, p.part_channels);
  }
}

// How many blocks share the walk of a tile. gridDim.x blocks run at a time, so that many items make a round.
// Of the numbers that fill one to four rounds, this is the one that ends soonest, or one of fewer rounds that
// ends hardly later.
__device__ __forceinline__ int splits_of_positives(const InfonceForwardParams& p, int tiles) {
  const int blocks = int(gridDim.x);
  int best = int(p.fewest_splits);
  float least = float((tiles * int64_t(best) + blocks - 1) / blocks) / float(best);
  for (int rounds = 1; rounds <= 4; ++rounds) {
    const int splits = min(int(int64_t(rounds) * blocks / max(tiles, 1)), int(p.splits));
    const float time = float(rounds) / float(max(splits, 1));
    if (splits <= best || time >= 0.95f * least) continue;
    best = splits;
    least = time;
  }
  return best;
}

template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) infonce_fwd_positives_kernel(Params p) {
  PositivesItem item{.number = int(blockIdx.x), .split = 0, .splits = 0};
  while (true) {
    SharedMemory memory;
    int* scratch = memory.take<int>(kClassTileScratch);
    int* kept_number = scratch + kClassTileScratch - 1;  // not in a register: the walk has none to spare
    const int columns = int(p.keys.data == nullptr ? p.num_anchors : p.num_keys);
    const bool grouped = are_grouped<Tile::kThreads>(
        p.label_ranges, (columns + Tile::S::kColumns - 1) / Tile::S::kColumns, scratch);
    const ClassTile tile = find_class_tile<Tile::kBlockA, Tile::kThreads>(
        p.sorted_labels, int(p.num_anchors), grouped, scratch, [&](int tiles) {
          item.splits = splits_of_positives(p, tiles);
          item.split = item.number / max(tiles, 1);
          return item.split < item.splits ? item.number % max(tiles, 1) : tiles;
        });
    if (item.number == 0 && threadIdx.x == 0) *p.positive_splits = item.splits;
    if (tile.first < 0) return;
    if (threadIdx.x == 0) *kept_number = item.number;
    add_positives<Tile>(p, tile, item, memory);  // it has barriers
    item.number = *kept_number + int(gridDim.x);
  }
}

// The second stage: a team of threads covers the channels, four per thread. There is one team for every
// kSplitsOfTeam splits, up to kMostFinishTeams, and the teams share the splits.
constexpr int kFinishTeam = 64, kSplitsOfTeam = 16, kMostFinishTeams = 8;
constexpr int kFinishThreads = kFinishTeam * kMostFinishTeams;

// Adds up four channels of a row over every `step`-th split, each times its factor. Splits with a negative
// factor were not written, and are skipped.
__device__ __forceinline__ float4 sum_of_parts(const float* parts, int64_t stride, const float* factors,
                                               int first, int splits, int step) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int split = first; split < splits; split += step) {
    const float factor = factors[split];
    if (factor < 0.f) continue;
    const float4 part = *reinterpret_cast<const float4*>(parts + split * stride);
    sum = make_float4(fmaf(part.x, factor, sum.x), fmaf(part.y, factor, sum.y), fmaf(part.z, factor, sum.z),
                      fmaf(part.w, factor, sum.w));
  }
  return sum;
}

// Combines the splits of an anchor, one block per anchor, and writes the results in the caller's order.
template <class Params>
__global__ void __launch_bounds__(kFinishThreads)
    infonce_fwd_finish_kernel(Params p, float weight_bias, float sigma_bias) {
  SharedMemory memory;
  float4* shares = memory.take<float4>(blockDim.x);  // of the teams, of four channels each
  float* negative_factors =
      memory.take<float>(size_t(p.splits));  // of a split's O; below 0: it was not written
  float* positive_factors = memory.take<float>(size_t(p.splits));  // and of its G
  const int64_t row = blockIdx.x, anchor = p.order[row];
  const int lane = int(threadIdx.x) % kWarp;
  if (p.sorted_labels[row] < 0) {  // it has no part in any tile
    if (threadIdx.x == 0) {
      p.loss[anchor] = p.pos_weight[anchor] = 0.f;
      p.neg_lse[anchor] = -INFINITY;
      p.pos_count[anchor] = 0;
    }
    if (p.anchor_grad == nullptr) return;
    for (int64_t d = threadIdx.x; d < p.row_channels; d += blockDim.x) {
      p.anchor_grad[anchor * p.row_channels + d] = 0.f;
    }
    return;
  }
  const int positive_splits = *p.positive_splits;
  const Negatives negatives = combine_negatives<kWarp>(p, row, lane);
  float loss = 0.f, pos_weight = 0.f;
  int pos_count = 0;
  for (int split = lane; split < positive_splits; split += kWarp) {
    loss += p.loss_parts[split * p.num_anchors + row];
    pos_weight += p.pos_weight_parts[split * p.num_anchors + row];
    pos_count += p.pos_count_parts[split * p.num_anchors + row];
  }
  loss = warp_sum(loss);
  pos_weight = warp_sum(pos_weight);
  pos_count = warp_sum(pos_count);
  const bool contrasts = pos_count > 0;
  if (threadIdx.x == 0) {
    p.loss[anchor] = contrasts ? loss / float(pos_count) : 0.f;
    p.neg_lse[anchor] = negatives.lse_log2(weight_bias) * kLn2;
    p.pos_weight[anchor] = contrasts ? pos_weight : 0.f;
    p.pos_count[anchor] = contrasts ? pos_count : 0;
  }
  if (p.anchor_grad == nullptr) return;
  for (int64_t split = threadIdx.x; split < p.splits; split += blockDim.x) {
    const int64_t part = split * p.num_anchors + row;
    const float shift = p.shift_parts[part];
    negative_factors[split] = shift == -INFINITY ? -1.f : exp2_approx(shift - negatives.shift);
    positive_factors[split] = split < positive_splits && p.pos_count_parts[part] > 0 ? 1.f : -1.f;
  }
  sync_block();  // the factors are there
  const float per_weight =
      contrasts && negatives.sum != 0.f ? unscale_of_negatives(p) * (pos_weight / negatives.sum) : 0.f;
  const float per_sigma = unscale_of_keys(p) * exp2f(-sigma_bias);
  const float scale = contrasts ? 1.f / (p.temperature * float(pos_count)) : 0.f;
  const int64_t stride = p.num_anchors * p.part_channels;
  const int team = int(threadIdx.x) / kFinishTeam, member = int(threadIdx.x) % kFinishTeam,
            teams = int(blockDim.x) / kFinishTeam;
  for (int64_t first = 0; first < p.row_channels; first += 4 * kFinishTeam) {
    const int64_t d = first + 4 * member, place = row * p.part_channels + d;
    const bool inside = d < p.row_channels;
    if (inside) {
      const float4 negative_sum = sum_of_parts(p.negative_parts + place, stride, negative_factors, team,
                                               int(p.splits), teams),
                   positive_sum = sum_of_parts(p.positive_parts + place, stride, positive_factors, team,
                                               positive_splits, teams);
      shares[threadIdx.x] = make_float4(per_weight * negative_sum.x - per_sigma * positive_sum.x,
                                        per_weight * negative_sum.y - per_sigma * positive_sum.y,
                                        per_weight * negative_sum.z - per_sigma * positive_sum.z,
                                        per_weight * negative_sum.w - per_sigma * positive_sum.w);
    }
    sync_block();  // the shares are there
    if (inside && team == 0) {
      float grad[4] = {0.f, 0.f, 0.f, 0.f};
      for (int other = 0; other < teams; ++other) {
        const float4 share = shares[other * kFinishTeam + member];
        grad[0] += share.x, grad[1] += share.y, grad[2] += share.z, grad[3] += share.w;
      }
      float* to = p.anchor_grad + anchor * p.row_channels + d;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (d + i < p.row_channels) to[i] = contrasts ? scale * grad[i] : 0.f;
      }
    }
    sync_block();  // nobody reads these shares any more
  }
}

}  // namespace pxc::cuda
