// What example mining ranks by: for each anchor, how many of its negatives, or positives, have their cosine
// in each of kScoreBins bins. Counts are integers, so atomics leave the same in any order.
#pragma once

#include "infonce_visits.cuh"

namespace pxc::cuda {

template <class Tile>
using CountsEngine = Engine<Tile, 0>;  // of which only the scores are wanted

// A tile for rows of 256 channels, with twice the warps of the usual one: counts take so much shared memory
// that a multiprocessor has room for a single block. Warps of two pieces of columns have the fast product.
template <class Math>
struct CountsTile : Tile<Math, 256, true, 2> {
  static constexpr int kRowWarps = Math::kPlanes == 2 ? 4 : 2, kColWarps = 8 / kRowWarps, kResident = 1;
  static constexpr int kBlockA = kRowWarps * CountsTile::kFragments * 16;
  static constexpr int kThreads = kRowWarps * kColWarps * kWarp;
  static constexpr int kScoreCols = CountsTile::kBlockK / kColWarps / 8;
  static constexpr int kOutputCols = 256 / kColWarps / 8;
};

// The counts of a block's rows in shared memory: a word has two neighbouring bins, so no block may have more
// columns than half a word can count.
constexpr int kWordsOfRow = kScoreBins / 2, kMostOfBin = (1 << 16) - 1;

template <class Tile>
constexpr size_t counts_bytes(int64_t row_stride, bool in_shared) {
  return CountsEngine<Tile>::bytes(row_stride) + shared_bytes<int>(2 * Tile::kBlockK) +
         (in_shared ? shared_bytes<int>(Tile::kBlockA * kWordsOfRow) : 0);
}

// The bin of a cosine times kScoreBins / 2. Bins have exact edges; NaN belongs to the first.
__device__ __forceinline__ int bin_of(float place) {
  constexpr float kHalf = kScoreBins / 2;
  return int(floorf(fminf(fmaxf(place, -kHalf), kHalf - 1.f))) + int(kHalf);  // a maximum ignores NaN
}

// Rows are anchors and columns are keys, whose counts are those of positives or of negatives, by kPass. Where
// a block's do not fit into shared memory (not kInShared), the second-level cache adds up the scores one by
// one.
template <class Tile, Pass kPass, bool kInShared>
__global__ void __launch_bounds__(Tile::kThreads)
    infonce_counts_kernel(ScoreCountsParams p, int32_t* counts) {
  using Engine = CountsEngine<Tile>;
  constexpr int kWords = Tile::kBlockA * kWordsOfRow;
  SharedMemory memory;
  const Side anchors = anchors_of<Tile>(p), keys = keys_of<Tile>(p);
  const Engine engine(memory, anchors, keys, int(blockIdx.x) * Tile::kBlockA);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  int* words = memory.take<int>(kInShared ? kWords : 0);
  const float per_score = unscale_of_anchors(p) * unscale_of_keys(p) * float(kScoreBins / 2);
  const auto counts_of = [&](int row) {
    return counts + int64_t(anchors.order[engine.first_row + row]) * kScoreBins;
  };
  if (kInShared) {  // the engine's first barrier comes before the first count
    for (int i = int(threadIdx.x); i < kWords; i += Tile::kThreads) words[i] = 0;
  }

  int row_labels[Tile::kFragments][2];
  each_row<Tile>([&](int f, int half) {
    row_labels[f][half] = label_at(anchors, engine.first_row + engine.local_row(f, half));
    if (kPass == Pass::kNegatives) row_labels[f][half] = max(row_labels[f][half], -1);
  });
  const LabelRange own = range_of_labelled(anchors, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<kPass, Tile> walk(p.label_ranges, keys.count, own, int(blockIdx.y), int(gridDim.y), engine.lane);
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool, unsigned first_column) {
        typename Engine::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        // All places first: they do not wait for each other, as atomics do. A score that does not count adds
        // 0, which takes no branch.
        unsigned places[Tile::kFragments][Tile::kScoreCols][4], ones[Tile::kFragments][Tile::kScoreCols][4];
        each_row<Tile>([&](int f, int half) {
          const int row = engine.local_row(f, half), row_label = row_labels[f][half];
          unsigned excluded = unsigned(keys.count);
          if (kPass == Pass::kPositives && p.exclude_self && row_label >= 0) {
            const int place = engine.first_row + row;
            excluded = unsigned(p.keys.data == nullptr ? place : anchors.order[place]);
          }
          each_score<Tile>([&](int n, int e) {
            const int column = engine.local_column(n) + e;
            const int label = key_labels[stage * Tile::kBlockK + column];
            // Exclusive or is positive of two labels that differ, and of nothing else, if what is none is -1.
            const bool counted = kPass == Pass::kNegatives ? (max(label, -1) ^ row_label) > 0
                                                           : label == row_label && label >= 0 &&
                                                                 first_column + unsigned(column) != excluded;
            const int i = 2 * half + e;
            places[f][n][i] = unsigned(row * kScoreBins + bin_of(scores[f][n][i] * per_score));
            ones[f][n][i] = counted ? 1u : 0u;
          });
        });
        each_row<Tile>([&](int f, int half) {
          each_score<Tile>([&](int n, int e) {
            const unsigned place = places[f][n][2 * half + e], one = ones[f][n][2 * half + e];
            if constexpr (kInShared) {
              atomic_add(words + place / 2, int(one << place % 2 * 16));
            } else if (one != 0) {
              atomic_add(counts_of(int(place / kScoreBins)) + place % kScoreBins, 1);
            }
          });
        });
      });
  if constexpr (kInShared) {
    for (int i = int(threadIdx.x); i < kWords; i += Tile::kThreads) {
      const unsigned both = unsigned(words[i]), first = both & kMostOfBin, second = both >> 16;
      if (both == 0) continue;
      int* to = counts_of(i / kWordsOfRow) + i % kWordsOfRow * 2;
      if (first != 0) atomic_add(to, int(first));
      if (second != 0) atomic_add(to + 1, int(second));
    }
  }
}

}  // namespace pxc::cuda
