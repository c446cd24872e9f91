// InfoNCE of anchors contrasted with each other, with matrix products of its own. Their scores are a
// symmetric matrix, so a tile of it serves the anchors of both its sides, and half of the tiles are enough:
// the forward makes half a product, the backward one and a half, as much as the two of a bank of keys.
//
// Tiles are taken in the order of a tournament: in every round each side meets one other. So no two threads
// write to one side, no sum needs an atomic, and an anchor meets the others in one order whatever the number
// of threads. They wait for each other after a round. One parallel region serves a whole call.
//
// Compiled as `infonce_fused.cpp`.
#include <omp.h>

#include <cmath>

#include "infonce_products.h"
#include "infonce_rows.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

constexpr int64_t kTile = kSymmetricTile;

struct Range {
  int64_t start, stop;
  int64_t size() const { return stop - start; }
};

template <class T>
const T* from(const T* of_anchors, int64_t first) {
  return of_anchors ? of_anchors + first : nullptr;
}

// A tile of scores, and the sides that it is of.
struct Tile {
  Range rows, columns;
  Range own_rows, own_columns;  // those of the one class that the sides share; of a side with itself all
  bool mixed;                   // whether they share one
  float (*scores)[kTile];       // of rows x columns
};

// One thread's part of a walk over all tiles.
template <class Multiply>
class Tournament {
 public:
  using Element = typename Multiply::Element;

  // Packs all anchors; with_gradient: for the second product as well.
  Tournament(const SymmetricRows& p, bool with_gradient)
      : p_(p),
        words_((p.channels + Multiply::kPerWord - 1) / Multiply::kPerWord),
        sides_((p.num_rows + kTile - 1) / kTile),
        thread_(omp_get_thread_num()),
        num_threads_(omp_get_num_threads()),
        of_rows_(static_cast<Word*>(p.panels)),
        of_channels_(with_gradient ? of_rows_ + sides_ * kTile * words_ : nullptr) {
    for (int64_t first = kPanel * thread_; first < sides_ * kTile; first += kPanel * num_threads_) {
      const auto row = [&](int64_t j) { return anchors() + (first + j) * words_ * Multiply::kPerWord; };
      Word* channels =
          of_channels_ ? channels_of(first / kTile) + first % kTile / Multiply::kPerWord * kPanel : nullptr;
      for (int64_t channel = 0; channel < p.channels; channel += kPanel) {
        pack_square<Element, Multiply>(
            row, first < p.num_rows ? p.num_rows - first : 0, p.channels, channel, of_rows_ + first * words_,
            channels ? channels + channel * (kTile / Multiply::kPerWord) : nullptr);
      }
    }
#pragma omp barrier
  }

  // Calls visit(tile) for this thread's part of the tiles, all or those that are mixed. It may change
  // what belongs to an anchor of the tile, which no other thread reads or writes meanwhile.
  template <class Visit>
  void visit(bool all, Visit visit) {
    for (int64_t side = thread_; side < sides_; side += num_threads_) visit(tile_of(side, side));
#pragma omp barrier
    // The last side stays and the others move around the table. If their number is odd, the last is nobody.
    const int64_t players = sides_ + sides_ % 2;
    for (int64_t round = 0; round < players - 1; ++round) {
      bool met = false;
      for (int64_t pair = 0; pair < players / 2; ++pair) {
        const int64_t here = pair == 0 ? players - 1 : (round + pair) % (players - 1);
        const int64_t opposite = (round - pair + players - 1) % (players - 1);
        const int64_t one = here < opposite ? here : opposite, other = here < opposite ? opposite : here;
        if (other >= sides_ || !(all || share_class(one, other))) continue;
        met = true;
        if (pair % num_threads_ == thread_) visit(tile_of(one, other));
      }
      if (met) {
#pragma omp barrier
      }
    }
  }

  // output[rows, D] += weights · anchors of a side. A row of weights is kTile elements long.
  void add_anchors(Range rows, const Element* weights, Range side, float* output) {
    constexpr int64_t kSteps = kTile / Multiply::kPerWord;
    const int64_t steps = (side.size() + Multiply::kPerWord - 1) / Multiply::kPerWord;
    const Word* channels = channels_of(side.start / kTile);
    for (int64_t channel = 0; channel < p_.channels; channel += kPanel) {
      multiply<Multiply>(
          rows.size(),
          {reinterpret_cast<const Word*>(weights), kSteps, channels + channel * kSteps, kPanel, steps,
           output + rows.start * p_.channels + channel, p_.channels, p_.channels - channel, true});
    }
  }

 private:
  const Element* anchors() const { return static_cast<const Element*>(p_.anchors.data); }

  Word* channels_of(int64_t side) const {
    return of_channels_ +
           side * ((p_.channels + kPanel - 1) / kPanel * kPanel * (kTile / Multiply::kPerWord));
  }

  Range range_of(int64_t side) const {
    const int64_t stop = (side + 1) * kTile;
    return {side * kTile, stop < p_.num_rows ? stop : p_.num_rows};
  }

  // Anchors are sorted by class, so two sides have at most one in common: the last of one, the first of the
  // other.
  bool share_class(int64_t one, int64_t other) const {
    return p_.anchor_labels[range_of(one).stop - 1] == p_.anchor_labels[range_of(other).start];
  }

  Tile tile_of(int64_t one, int64_t other) {
    Tile tile{range_of(one), range_of(other), range_of(one), range_of(other), true, scores_};
    if (one != other) {
      tile.mixed = share_class(one, other);
      const int32_t label = p_.anchor_labels[tile.columns.start];
      Range &last = tile.own_rows, &first = tile.own_columns;
      while (last.start < last.stop && p_.anchor_labels[last.start] != label) ++last.start;
      first.stop = first.start;
      while (tile.mixed && first.stop < tile.columns.stop && p_.anchor_labels[first.stop] == label)
        ++first.stop;
    }
    for (int64_t first = tile.columns.start; first < tile.columns.stop; first += kPanel) {
      multiply<Multiply>(tile.rows.size(),
                         {reinterpret_cast<const Word*>(anchors()) + tile.rows.start * words_, words_,
                          of_rows_ + first * words_, kPanel, words_,
                          scores_[0] + (first - tile.columns.start), kTile, kPanel, false});
    }
    return tile;
  }

  const SymmetricRows& p_;
  const int64_t words_, sides_, thread_, num_threads_;
  Word* const of_rows_;      // [sides kTile / kPanel][words of a row, kPanel]
  Word* const of_channels_;  // [sides][channels / kPanel, rounded up][kTile / kPerWord, kPanel]
  alignas(64) float scores_[kTile][kTile];
};

// The same tile, seen from its other side.
void mirror(const Tile& tile, float (*mirrored)[kTile]) {
  for (int64_t i = 0; i < kTile; i += kWidth) {
    for (int64_t j = 0; j < kTile; j += kWidth) {
      transpose([&](int row) { return &tile.scores[i + row][j]; }, reinterpret_cast<Word*>(&mirrored[j][i]),
                kTile);
    }
  }
}

Tile turned(const Tile& tile, float (*mirrored)[kTile]) {
  return {tile.columns, tile.rows, tile.own_columns, tile.own_rows, tile.mixed, mirrored};
}

// Calls work(tile) for a tile and, unless it is of a side with itself, for its mirror image.
template <class Work>
void from_both_sides(Tile tile, Work work) {
  alignas(64) float mirrored[kTile][kTile];
  const bool of_two = tile.rows.start != tile.columns.start;
  if (of_two) mirror(tile, mirrored);  // first: the work may be done in place
  work(tile);
  if (of_two) work(turned(tile, mirrored));
}

// Calls work(row, its scores with anchors of its class, those anchors).
template <class Work>
void each_row_of_class(const SymmetricRows& p, const Tile& tile, Work work) {
  Range own = tile.own_columns;
  for (int64_t i = tile.own_rows.start; i < tile.own_rows.stop; ++i) {
    if (tile.rows.start == tile.columns.start) {
      const int32_t label = p.anchor_labels[i];
      if (i == tile.rows.start || p.anchor_labels[i - 1] != label) {
        own = {i, i};
        while (own.stop < tile.columns.stop && p.anchor_labels[own.stop] == label) ++own.stop;
      }
    }
    work(i, tile.scores[i - tile.rows.start] + (own.start - tile.columns.start), own);
  }
}

template <class Multiply>
void forward(const SymmetricForwardParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
    Tournament<Multiply> tournament(p, false);
    tournament.visit(true, [&](const Tile& both) {
      from_both_sides(both, [&](const Tile& tile) {
        const NegativesParams of_tile{
            .scores = nullptr,
            .num_rows = p.num_rows,
            .num_keys = tile.columns.size(),
            .anchor_labels = p.anchor_labels,
            .key_labels = tile.mixed ? p.anchor_labels + tile.columns.start : nullptr,
            .neg_min = p.neg_min,
            .scale = p.scale,
            .shift = p.shift,
            .sum = p.sum,
            .output = nullptr,
            .channels = p.channels,
            .threads = 1};
        for (int64_t i = tile.rows.start; i < tile.rows.stop; ++i)
          negatives_row(of_tile, i, tile.scores[i - tile.rows.start]);
      });
    });
#pragma omp for
    for (int64_t i = 0; i < p.num_rows; ++i) p.sum_log2[i] = float(std::log2(double(p.sum[i])));
    tournament.visit(false, [&](const Tile& both) {
      from_both_sides(both, [&](const Tile& tile) {
        each_row_of_class(p, tile, [&](int64_t i, float* scores, Range own) {
          const PositivesParams of_row{.scores = nullptr,
                                       .num_rows = p.num_rows,
                                       .num_keys = own.size(),
                                       .shift = p.shift,
                                       .sum_log2 = p.sum_log2,
                                       .anchor_index = p.anchor_index,
                                       .key_index = from(p.anchor_index, own.start),
                                       .pos_max = p.pos_max,
                                       .scale = p.scale,
                                       .loss_sum = p.loss_sum,
                                       .pos_weight_sum = p.pos_weight_sum,
                                       .pos_counts = p.pos_counts,
                                       .threads = 1};
          positives_row(of_row, i, scores);
        });
      });
    });
  }
}

template <class Multiply>
void counts(const SymmetricCountsParams& p) {
  const auto count = [&](int64_t i, const float* scores, Range columns, const int32_t* labels,
                         const int64_t* index, int32_t* counts) {
    const CountScoresParams of_row{.scores = nullptr,
                                   .num_rows = p.num_rows,
                                   .num_keys = columns.size(),
                                   .anchor_labels = p.anchor_labels,
                                   .key_labels = from(labels, columns.start),
                                   .anchor_index = index,
                                   .key_index = from(index, columns.start),
                                   .counts = nullptr,
                                   .threads = 1};
    count_row(of_row, i, scores, counts + p.places[i] * kScoreBins);
  };
#pragma omp parallel num_threads(p.threads)
  {
    Tournament<Multiply> tournament(p, false);
    tournament.visit(true, [&](const Tile& both) {
      from_both_sides(both, [&](const Tile& tile) {
        const int32_t* labels = tile.mixed ? p.anchor_labels : nullptr;
        for (int64_t i = tile.rows.start; i < tile.rows.stop; ++i)
          count(i, tile.scores[i - tile.rows.start], tile.columns, labels, nullptr, p.neg_counts);
        if (!tile.mixed) return;
        each_row_of_class(p, tile, [&](int64_t i, const float* scores, Range own) {
          count(i, scores, own, nullptr, p.anchor_index, p.pos_counts);
        });
      });
    });
  }
}

// One thread's part of the backward.
template <class Multiply>
class Backward {
 public:
  explicit Backward(const SymmetricBackwardParams& p) : p_(p), tournament_(p, true) {}

  void run() {
    tournament_.visit(true, [&](const Tile& both) {
      score_gradients(both);
      from_both_sides(both, [&](const Tile& tile) { add(tile); });
    });
  }

 private:
  // In place: ds of both roles of every pair.
  void score_gradients(const Tile& tile) {
    const int64_t first = tile.columns.start;
    const bool alone = tile.rows.start == first;
    const ScoreGradientParams of_tile{.scores = nullptr,
                                      .num_rows = p_.num_rows,
                                      .num_anchors = tile.columns.size(),
                                      .row_labels = p_.anchor_labels,
                                      .anchor_labels = p_.anchor_labels + first,
                                      .row_index = alone ? p_.anchor_index : nullptr,
                                      .anchor_index = from(p_.anchor_index, first),
                                      .neg_lse_log2 = p_.neg_lse_log2 + first,
                                      .push = p_.push + first,
                                      .pull = p_.pull + first,
                                      .row_neg_lse_log2 = p_.neg_lse_log2,
                                      .row_push = p_.push,
                                      .row_pull = p_.pull,
                                      .neg_min = from(p_.neg_min, first),
                                      .pos_max = from(p_.pos_max, first),
                                      .row_neg_min = p_.neg_min,
                                      .row_pos_max = p_.pos_max,
                                      .scale = p_.scale,
                                      .threads = 1};
    for (int64_t i = tile.rows.start; i < tile.rows.stop; ++i)
      score_gradients_row<true>(of_tile, i, tile.scores[i - tile.rows.start], tile.mixed);
  }

  void add(const Tile& tile) {
    if constexpr (Multiply::kPerWord == 1) {
      tournament_.add_anchors(tile.rows, tile.scores[0], tile.columns, p_.grad);
    } else {
      round(tile);
      tournament_.add_anchors(tile.rows, rounded_[0], tile.columns, p_.grad);
      if (!tile.mixed) return;
      // Positives are few and weigh much, so what the first rounding leaves of them takes part as well.
      for (int64_t i = 0; i < tile.rows.size(); ++i) {
#pragma omp simd
        for (int64_t j = 0; j < kTile; ++j) tile.scores[i][j] -= load(&rounded_[i][j]);
      }
      round(tile);
      tournament_.add_anchors(tile.rows, rounded_[0], tile.columns, p_.grad);
    }
  }

  void round(const Tile& tile) {
    const int64_t count = tile.columns.size();
    for (int64_t i = tile.rows.start; i < tile.rows.stop; ++i) {
      const float* weights = tile.scores[i - tile.rows.start];
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) sum += weights[j];
      const float left = sum - Multiply::round(weights, count, rounded_[i - tile.rows.start]);
      if (!tile.mixed) p_.residual[i] += left;
    }
  }

  const SymmetricBackwardParams& p_;
  Tournament<Multiply> tournament_;
  alignas(64) BFloat16 rounded_[kTile][kTile];
};

template <class Multiply>
void backward(const SymmetricBackwardParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
    Backward<Multiply> backward(p);
    backward.run();
    if constexpr (Multiply::kPerWord > 1) {
      // Weights sum to nearly nothing, and where all anchors are alike the gradient is what remains: what
      // rounding left of the sum goes along their mean.
      const BFloat16* anchors = static_cast<const BFloat16*>(p.anchors.data);
      const int64_t stride = p.channels + p.channels % 2;
#pragma omp for
      for (int64_t channel = 0; channel < p.channels; channel += kPanel) {
        const int64_t count = p.channels - channel < kPanel ? p.channels - channel : kPanel;
        float mean[kPanel] = {};
        for (int64_t i = 0; i < p.num_rows; ++i) {
          for (int64_t d = 0; d < count; ++d) mean[d] += load(anchors + i * stride + channel + d);
        }
        for (int64_t d = 0; d < count; ++d) mean[d] /= float(p.num_rows);
        for (int64_t i = 0; i < p.num_rows; ++i) {
          for (int64_t d = 0; d < count; ++d) p.grad[i * p.channels + channel + d] += p.residual[i] * mean[d];
        }
      }
    }
  }
}

}  // namespace

#ifdef __AVX512BF16__
#define PXC_DEFINE(name, kernel, Params)                                             \
  void name(const Params& p) {                                                       \
    p.anchors.dtype == DType::kBFloat16 ? kernel<BFloat16Pair>(p) : avx512::name(p); \
  }
#else
#define PXC_DEFINE(name, kernel, Params) \
  void name(const Params& p) { kernel<Float32>(p); }
#endif
PXC_DEFINE(symmetric_forward, forward, SymmetricForwardParams)
PXC_DEFINE(symmetric_counts, counts, SymmetricCountsParams)
PXC_DEFINE(symmetric_backward, backward, SymmetricBackwardParams)
#undef PXC_DEFINE

}  // namespace PXC_ISA
}  // namespace pxc::cpu
