// What example mining ranks by: for each anchor, how many of its negatives, or positives, have their cosine
// in each of kScoreBins bins. Counts are integers, so atomics leave the same in any order.
#pragma once

#include "infonce_visits.cuh"

namespace pxc::cuda {

template <class Tile>
using CountsEngine = Engine<Tile, 0>;  // of which only the scores are wanted

// The counts of a block's rows, in shared memory if they fit. A word there holds two neighbouring bins, so a
// block passes them on before either has met 2^16 columns.
constexpr int kWordsOfRow = kScoreBins / 2, kMostOfBin = (1 << 16) - 1;

template <class Tile>
size_t counts_bytes(int64_t row_stride, bool in_shared) {
  return CountsEngine<Tile>::bytes(row_stride) + shared_bytes<int>(2 * Tile::kBlockK) +
         (in_shared ? shared_bytes<int>(Tile::kBlockA * kWordsOfRow) : 0);
}

// The bin of a cosine times kScoreBins / 2. Bins have exact edges; NaN belongs to the first.
__device__ __forceinline__ int bin_of(float place) {
  constexpr float kHalf = kScoreBins / 2;
  return int(floorf(fminf(fmaxf(place, -kHalf), kHalf - 1.f))) + int(kHalf);  // a maximum ignores NaN
}

// Of the keys, which are the positives' or the negatives', by kPass.
template <class Tile, Pass kPass>
__global__ void __launch_bounds__(Tile::kThreads)
    infonce_counts_kernel(ScoreCountsParams p, int32_t* counts, bool in_shared) {
  using Engine = CountsEngine<Tile>;
  SharedMemory memory;
  const Side anchors = anchors_of<Tile>(p), keys = keys_of<Tile>(p);
  const Engine engine(memory, anchors, keys, int(blockIdx.x) * Tile::kBlockA);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  int* words = in_shared ? memory.take<int>(Tile::kBlockA * kWordsOfRow) : nullptr;
  const float per_score =
      (p.unscale == nullptr ? 1.f : p.unscale[0] * unscale_of_keys(p)) * float(kScoreBins / 2);
  const auto counts_of = [&](int row) {
    return counts + int64_t(anchors.order[engine.first_row + row]) * kScoreBins;
  };
  const auto clear = [&] {
    for (int i = int(threadIdx.x); i < Tile::kBlockA * kWordsOfRow; i += Tile::kThreads) words[i] = 0;
  };
  const auto pass_on = [&] {
    for (int i = int(threadIdx.x); i < Tile::kBlockA * kWordsOfRow; i += Tile::kThreads) {
      const unsigned both = unsigned(words[i]);
      if (both == 0) continue;
      int* to = counts_of(i / kWordsOfRow) + i % kWordsOfRow * 2;
      if ((both & 0xffff) != 0) atomic_add(to, int(both & 0xffff));
      if (both >> 16 != 0) atomic_add(to + 1, int(both >> 16));
    }
  };
  if (in_shared) clear();
  sync_block();  // nobody counts before all are 0

  int row_labels[Tile::kFragments][2];
  each_row<Tile>([&](int f, int half) {
    row_labels[f][half] = label_at(anchors, engine.first_row + engine.local_row(f, half));
  });
  const LabelRange own = range_of_labelled(anchors, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<kPass, Tile> walk(p.label_ranges, keys.count, own, int(blockIdx.y), int(gridDim.y), engine.lane);
  int tiles = 0;
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool, unsigned first_column) {
        typename Engine::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        each_row<Tile>([&](int f, int half) {
          const int row = engine.local_row(f, half), row_label = row_labels[f][half];
          if (row_label < 0) return;
          unsigned excluded = unsigned(keys.count);
          if (kPass == Pass::kPositives && p.exclude_self) {
            const int place = engine.first_row + row;
            excluded = unsigned(p.keys.data == nullptr ? place : anchors.order[place]);
          }
          each_score<Tile>([&](int n, int e) {
            const int column = engine.local_column(n) + e;
            const int label = key_labels[stage * Tile::kBlockK + column];
            const bool counted = kPass == Pass::kNegatives
                                     ? label >= 0 && label != row_label
                                     : label == row_label && first_column + unsigned(column) != excluded;
            if (!counted) return;
            const int bin = bin_of(scores[f][n][2 * half + e] * per_score);
            if (in_shared) {
              atomic_add(words + row * kWordsOfRow + bin / 2, 1 << bin % 2 * 16);
            } else {
              atomic_add(counts_of(row) + bin, 1);
            }
          });
        });
        if (in_shared && ++tiles == kMostOfBin / Tile::kBlockK) {
          tiles = 0;
          sync_block();  // all have counted
          pass_on();
          clear();  // each its own: nobody counts before the next tile is there
        }
      });
  if (in_shared) pass_on();
}

}  // namespace pxc::cuda
