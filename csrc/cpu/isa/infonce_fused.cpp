// The forward of InfoNCE with matrix products of its own. For a block of anchors and a tile of keys, the dot
// products, the weights computed from them and the second product stay in the core's own cache. All threads
// together pack the keys of a tile, once for both products. One parallel region serves a whole call.
//
// Of each tile every thread takes a share of the anchors, and all of them take the tiles in one order,
// together: results do not depend on their number. This file is compiled for AVX2 and AVX-512 (fp32 products)
// and for AVX512-BF16 (bf16 products); nothing in it may be shared with another translation unit: no
// standard templates.
#include <omp.h>

#include <cmath>

#include "infonce_products.h"
#include "infonce_rows.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

constexpr int kBlockK = kFusedBlockK;

// Anchors that meet a tile at a time: their scores stay in the core's own cache, and so does a part of a
// panel while all of them take it.
constexpr int kBlockA = 48;

// So few anchors of a class take its keys as they lie, by dot products.
constexpr int64_t kFew = 16;

// So few anchors of a call take fp32 keys as they lie: to pack these would take half as long as to multiply
// them.
constexpr int64_t kSlim = 96, kSlimChannels = 512;

// Keys that are multiplied together.
struct Tile {
  int64_t count;
  int64_t keys[kBlockK];
  int32_t labels[kBlockK];
};

// The keys of a tile as panels of both products; null: as they lie.
struct Panels {
  Word* keys;      // [kBlockK / kPanel][words of a row, kPanel]
  Word* channels;  // [channels / kPanel, rounded up][kBlockK / kPerWord, kPanel]; null without gradient
  bool few;        // as they lie, for dot products
};

struct Range {
  int64_t start, stop;
};

// One thread's part of both walks, over the negative keys and over the keys.
template <class Key, class Multiply>
class Walk {
 public:
  // with_gradient: keys are packed for the second product as well.
  Walk(const FusedRows& p, bool with_gradient)
      : p_(p),
        with_gradient_(with_gradient),
        words_((p.channels + Multiply::kPerWord - 1) / Multiply::kPerWord),
        channel_panels_((p.channels + kPanel - 1) / kPanel),
        thread_(omp_get_thread_num()),
        num_threads_(omp_get_num_threads()) {}

  // Calls block(rows, panels, mixed) for every block of anchors and tile of negative keys that meet. A mixed
  // tile may have keys of the anchors' own class.
  template <class Block>
  void negatives(Block block) {
    for (int64_t t = 0; t < p_.num_negative_tiles; ++t) {
      const int64_t* tile = p_.negative_tiles + 3 * t;
      const int64_t first = tile[0], size = tile[1], label = tile[2];
      tile_.count = 0;
      for (int64_t j = first; j < first + size; ++j) {
        if (p_.negative_labels[j] < 0) continue;  // it may hold anything, even NaN
        tile_.keys[tile_.count] = j;
        tile_.labels[tile_.count++] = p_.negative_labels[j];
      }
      const Panels panels = panels_together(p_.negative_keys.data);
      if (label < 0) {
        share({0, p_.num_rows}, 0, p_.num_rows, [&](Range rows) { block(rows, panels, true); });
      } else {
        const Range own = anchors_of(label);
        const int64_t others = p_.num_rows - (own.stop - own.start);
        const auto visit = [&](Range rows) { block(rows, panels, false); };
        share({0, own.start}, 0, others, visit);
        share({own.stop, p_.num_rows}, own.start, others, visit);
      }
    }
  }

  // Calls block(rows, panels) for every block of anchors and tile of keys of their class.
  template <class Block>
  void positives(Block block) {
    int64_t num_classes = 0;
    for (Range own = class_from(0); own.start < p_.num_rows; own = class_from(own.stop)) ++num_classes;
    if (num_threads_ > p_.num_panels || num_classes < 2 * num_threads_) {
      for (Range own = class_from(0); own.start < p_.num_rows; own = class_from(own.stop)) {
        for (Cursor cursor{0, 0}; collect(p_.anchor_labels[own.start], cursor);) {
          const Panels panels = are_few(own) ? few() : panels_together(p_.keys.data);
          share(own, 0, own.stop - own.start, [&](Range rows) { block(rows, panels); });
        }
      }
      return;
    }
    // Each thread takes classes of its own: of few anchors a part would be less than a block, and nobody
    // waits.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_classes; ++i) {
      Range own = class_from(0);
      for (int64_t before = 0; before < i; ++before) own = class_from(own.stop);
      for (Cursor cursor{0, 0}; collect(p_.anchor_labels[own.start], cursor);) {
        const Panels panels = are_few(own) ? few() : panels_alone(p_.keys.data);
        in_blocks(own, [&](Range rows) { block(rows, panels); });
      }
    }
  }

  const Tile& tile() const { return tile_; }
  float* scores(int64_t row) { return scores_[row]; }

  void multiply_anchors(Range rows, const Panels& panels) {
    if (panels.few) {
      const int64_t stride = words_ * Multiply::kPerWord;
      const auto* anchors =
          static_cast<const typename Multiply::Element*>(p_.anchors.data) + rows.start * stride;
      return few_at_a_time(rows.stop - rows.start, [&]<int kRows>(int64_t first) {
        dot_products<kRows>(anchors + first * stride, stride, key(), tile_.count, p_.channels, scores_[first],
                            kBlockK);
      });
    }
    if (!panels.keys) return multiply_lying(rows);
    const Word* anchors = static_cast<const Word*>(p_.anchors.data) + rows.start * words_;
    for (int64_t first = 0; first < tile_.count; first += kPanel) {
      multiply<Multiply>(rows.stop - rows.start, {anchors, words_, panels.keys + first * words_, kPanel,
                                                  words_, scores_[0] + first, kBlockK, kPanel, false});
    }
  }

  // output[rows, D] += weights · keys; of packed keys the weights are of the anchors' type.
  void add_keys(Range rows, const void* weights, const Panels& panels, float* output) {
    if (panels.few) {
      return few_at_a_time(rows.stop - rows.start, [&]<int kRows>(int64_t first) {
        add_weighted<kRows>(static_cast<const float*>(weights) + first * kBlockK, kBlockK, key(), tile_.count,
                            p_.channels, output + (rows.start + first) * p_.channels);
      });
    }
    constexpr int64_t kSteps = kBlockK / Multiply::kPerWord;
    const int64_t steps = (tile_.count + Multiply::kPerWord - 1) / Multiply::kPerWord;
    for (int64_t channel = 0; channel < p_.channels; channel += kPanel) {
      const Word* panel = panels.channels ? panels.channels + channel * kSteps : lying_ + channel;
      multiply<Multiply>(
          rows.stop - rows.start,
          {static_cast<const Word*>(weights), kSteps, panel, panels.channels ? kPanel : p_.channels, steps,
           output + rows.start * p_.channels + channel, p_.channels, p_.channels - channel, true});
    }
  }

 private:
  struct Cursor {
    int64_t tile, key;
  };

  // Collects the next keys of a class; false if there are none. Tiles of another class are skipped, because
  // every thread repeats this search.
  bool collect(int32_t label, Cursor& at) {
    tile_.count = 0;
    for (; at.tile < p_.num_tiles; ++at.tile, at.key = 0) {
      const int64_t first = p_.tiles[3 * at.tile], size = p_.tiles[3 * at.tile + 1];
      const int64_t of_tile = p_.tiles[3 * at.tile + 2];
      if (of_tile >= 0 && of_tile != label) continue;
      for (; at.key < size; ++at.key) {
        if (tile_.count == kBlockK) return true;
        if (p_.key_labels[first + at.key] == label) tile_.keys[tile_.count++] = first + at.key;
      }
    }
    return tile_.count > 0;
  }

  // Whether the tile's keys are multiplied as they lie, one after the other.
  bool are_slim() const {
    return sizeof(Key) == sizeof(Word) && p_.num_rows <= kSlim && words_ <= kSlimChannels &&
           p_.channels % kPanel == 0 && tile_.count > 0 &&
           tile_.keys[tile_.count - 1] - tile_.keys[0] == tile_.count - 1;
  }

  Panels lying(const void* keys) {
    lying_ = reinterpret_cast<const Word*>(static_cast<const Key*>(keys) + tile_.keys[0] * p_.channels);
    return {};
  }
  static Panels few() { return {nullptr, nullptr, true}; }

  // The scores come out a column for each anchor: the keys take the part of the rows, which need no packing.
  // They are summed in the same order as of packed keys.
  void multiply_lying(Range rows) {
    const Word* anchors = static_cast<const Word*>(p_.anchors.data) + rows.start * words_;
    for (int64_t first = 0; first < rows.stop - rows.start; first += kPanel) {
      const auto row = [&](int64_t j) {
        return reinterpret_cast<const float*>(anchors + (first + j) * words_);
      };
      for (int64_t channel = 0; channel < p_.channels; channel += kPanel)
        pack_square<float, Float32>(row, rows.stop - rows.start - first, p_.channels, channel, packed_,
                                    nullptr);
      for (int64_t begin = 0; begin < tile_.count; begin += kBlockA) {
        const int64_t count = tile_.count - begin < kBlockA ? tile_.count - begin : kBlockA;
        alignas(64) float columns[kBlockA][kPanel];
        multiply<Float32>(count, {lying_ + begin * words_, words_, packed_, kPanel, words_, columns[0],
                                  kPanel, kPanel, false});
        for (int64_t key = 0; key < count; key += kWidth) {
          for (int64_t anchor = first; anchor < first + kPanel && anchor < kBlockA; anchor += kWidth) {
            transpose([&](int i) { return columns[key + i] + anchor - first; },
                      reinterpret_cast<Word*>(scores_[anchor] + begin + key), kBlockK);
          }
        }
      }
    }
  }

  // A key of the tile.
  auto key() const {
    return [this](int64_t j) { return static_cast<const Key*>(p_.keys.data) + tile_.keys[j] * p_.channels; };
  }

  static bool are_few(Range anchors) { return anchors.stop - anchors.start <= kFew; }

  // The anchors of the class that begins there.
  Range class_from(int64_t start) const {
    Range range{start, start};
    while (range.stop < p_.num_rows && p_.anchor_labels[range.stop] == p_.anchor_labels[start]) ++range.stop;
    return range;
  }

  Range anchors_of(int64_t label) const {
    Range range{0, 0};
    while (range.start < p_.num_rows && p_.anchor_labels[range.start] < label) ++range.start;
    range.stop = range.start;
    while (range.stop < p_.num_rows && p_.anchor_labels[range.stop] == label) ++range.stop;
    return range;
  }

  // Visits this thread's part of `rows`, in blocks. The threads share `total` rows evenly;
  // `rows` come after the first `before` of them.
  template <class Visit>
  void share(Range rows, int64_t before, int64_t total, Visit visit) {
    const int64_t shift = rows.start - before;
    int64_t start = total * thread_ / num_threads_ + shift,
            stop = total * (thread_ + 1) / num_threads_ + shift;
    if (start < rows.start) start = rows.start;
    if (stop > rows.stop) stop = rows.stop;
    if (start >= stop) return;
    in_blocks({start, stop}, visit);
  }

  // Of even size.
  template <class Visit>
  static void in_blocks(Range rows, Visit visit) {
    const int64_t size = rows.stop - rows.start, blocks = (size + kBlockA - 1) / kBlockA;
    for (int64_t i = 0; i < blocks; ++i)
      visit(Range{rows.start + size * i / blocks, rows.start + size * (i + 1) / blocks});
  }

  // All threads pack the tile, each some of its keys. Two panels alternate, so that a thread which is done
  // with a tile may pack the next one while others still read this one. They wait for each other even if
  // there is nothing to pack: an anchor may have been another thread's in the tile before.
  Panels panels_together(const void* keys) {
    Panels panels;
    if (are_slim()) {
      panels = lying(keys);
    } else {
      turn_ ^= 1;
      panels = panels_of(turn_);
      pack(keys, panels, thread_, num_threads_);
    }
#pragma omp barrier
    return panels;
  }

  // This thread packs the tile, into panels of its own.
  Panels panels_alone(const void* keys) {
    if (are_slim()) return lying(keys);
    const Panels panels = panels_of(thread_);
    pack(keys, panels, 0, 1);
    return panels;
  }

  Panels panels_of(int64_t turn) const {
    const int64_t key_words = kBlockK * words_;
    const int64_t channel_words =
        with_gradient_ ? channel_panels_ * kPanel * (kBlockK / Multiply::kPerWord) : 0;
    Word* buffer = static_cast<Word*>(p_.panels) + turn * (key_words + channel_words);
    return {buffer, with_gradient_ ? buffer + key_words : nullptr, false};
  }

  // Packs one of every `parts` squares of keys.
  void pack(const void* keys, const Panels& panels, int64_t part, int64_t parts) {
    for (int64_t first = kPanel * part; first < tile_.count; first += kPanel * parts) {
      const auto row = [&](int64_t j) {
        return static_cast<const Key*>(keys) + tile_.keys[first + j] * p_.channels;
      };
      for (int64_t channel = 0; channel < p_.channels; channel += kPanel) {
        pack_square<Key, Multiply>(
            row, tile_.count - first, p_.channels, channel, panels.keys + first * words_,
            panels.channels ? panels.channels + (channel * kBlockK + first * kPanel) / Multiply::kPerWord
                            : nullptr);
      }
    }
  }

  const FusedRows& p_;
  const bool with_gradient_;
  const int64_t words_, channel_panels_, thread_, num_threads_;
  int turn_ = 0;
  Tile tile_;
  const Word* lying_ = nullptr;  // where the tile begins
  alignas(64) Word packed_[kSlimChannels * kPanel];
  alignas(64) float scores_[kBlockA][kBlockK];
};

// One thread's part of the forward.
template <class Key, class Multiply>
class Forward {
 public:
  explicit Forward(const FusedForwardParams& p) : p_(p), walk_(p, p.negatives != nullptr) {}

  void negatives() {
    walk_.negatives(
        [&](Range rows, const Panels& panels, bool mixed) { negatives_block(rows, panels, mixed); });
  }

  void positives() {
    walk_.positives([&](Range rows, const Panels& panels) { positives_block(rows, panels); });
  }

 private:
  void negatives_block(Range rows, const Panels& panels, bool mixed) {
    walk_.multiply_anchors(rows, panels);
    const NegativesParams p{.scores = nullptr,
                            .num_rows = p_.num_rows,
                            .num_keys = walk_.tile().count,
                            .anchor_labels = p_.anchor_labels,
                            .key_labels = mixed ? walk_.tile().labels : nullptr,
                            .neg_min = p_.neg_min,
                            .scale = p_.scale,
                            .shift = p_.shift,
                            .sum = p_.sum,
                            .output = p_.negatives,
                            .channels = p_.channels,
                            .threads = 1};
    float shifts[kBlockA];
    for (int64_t i = rows.start; i < rows.stop; ++i) {
      shifts[i - rows.start] = p_.shift[i];
      negatives_row(p, i, walk_.scores(i - rows.start));
    }
    if (!p_.negatives) return;
    if constexpr (Multiply::kPerWord == 1) {
      walk_.add_keys(rows, walk_.scores(0), panels, p_.negatives);
    } else {
      // Finish divides O by the sum of the *rounded* weights. With the exact sum, rounding would leave an
      // error along the direction that all keys share, and the gradient is what remains once that direction
      // cancels.
      for (int64_t i = rows.start; i < rows.stop; ++i) {
        const int64_t row = i - rows.start;
        if (p_.shift[i] != shifts[row]) p_.weight_sum[i] *= exp2((shifts[row] - p_.shift[i]) * p_.scale);
        p_.weight_sum[i] += Multiply::round(walk_.scores(row), walk_.tile().count, rounded_[row]);
      }
      walk_.add_keys(rows, rounded_[0], panels, p_.negatives);
    }
  }

  void positives_block(Range rows, const Panels& panels) {
    walk_.multiply_anchors(rows, panels);
    const int64_t num_keys = walk_.tile().count;
    const PositivesParams p{.scores = nullptr,
                            .num_rows = p_.num_rows,
                            .num_keys = num_keys,
                            .shift = p_.shift,
                            .sum_log2 = p_.sum_log2,
                            .anchor_index = p_.anchor_index,
                            .key_index = walk_.tile().keys,
                            .pos_max = p_.pos_max,
                            .scale = p_.scale,
                            .loss_sum = p_.loss_sum,
                            .pos_weight_sum = p_.pos_weight_sum,
                            .pos_counts = p_.pos_counts,
                            .threads = 1};
    for (int64_t i = rows.start; i < rows.stop; ++i) positives_row(p, i, walk_.scores(i - rows.start));
    if (!p_.positives) return;
    if (Multiply::kPerWord == 1 || !panels.keys) {
      walk_.add_keys(rows, walk_.scores(0), panels, p_.positives);
    } else if constexpr (Multiply::kPerWord > 1) {
      // G nearly cancels with S O, so what the first rounding leaves takes part as well.
      round_weights(rows.stop - rows.start);
      walk_.add_keys(rows, rounded_[0], panels, p_.positives);
      for (int64_t i = 0; i < rows.stop - rows.start; ++i) {
        float* weights = walk_.scores(i);
#pragma omp simd
        for (int64_t j = 0; j < num_keys; ++j) weights[j] -= load(&rounded_[i][j]);
      }
      round_weights(rows.stop - rows.start);
      walk_.add_keys(rows, rounded_[0], panels, p_.positives);
    }
  }

  void round_weights(int64_t num_rows) {
    for (int64_t i = 0; i < num_rows; ++i) Multiply::round(walk_.scores(i), walk_.tile().count, rounded_[i]);
  }

  const FusedForwardParams& p_;
  Walk<Key, Multiply> walk_;
  alignas(64) BFloat16 rounded_[kBlockA][kBlockK];
};

template <class Key, class Multiply>
void forward(const FusedForwardParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
    Forward<Key, Multiply> forward(p);
    forward.negatives();
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < p.num_rows; ++i) p.sum_log2[i] = float(std::log2(double(p.sum[i])));
    forward.positives();
  }
}

template <class Key, class Multiply>
void counts(const FusedCountsParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
    Walk<Key, Multiply> walk(p, false);
    const auto count = [&](Range rows, const Panels& panels, bool positives, bool mixed, int32_t* counts) {
      walk.multiply_anchors(rows, panels);
      const CountScoresParams of_block{.scores = nullptr,
                                       .num_rows = p.num_rows,
                                       .num_keys = walk.tile().count,
                                       .anchor_labels = p.anchor_labels,
                                       .key_labels = mixed ? walk.tile().labels : nullptr,
                                       .anchor_index = positives ? p.anchor_index : nullptr,
                                       .key_index = walk.tile().keys,
                                       .counts = nullptr,
                                       .threads = 1};
      for (int64_t i = rows.start; i < rows.stop; ++i)
        count_row(of_block, i, walk.scores(i - rows.start), counts + p.places[i] * kScoreBins);
    };
    walk.negatives([&](Range rows, const Panels& panels, bool mixed) {
      count(rows, panels, false, mixed, p.neg_counts);
    });
#pragma omp barrier
    walk.positives([&](Range rows, const Panels& panels) { count(rows, panels, true, false, p.pos_counts); });
  }
}

}  // namespace

void fused_forward(const FusedForwardParams& p) {
#ifdef __AVX512BF16__
  if (p.keys.dtype == DType::kBFloat16) return forward<BFloat16, BFloat16Pair>(p);
  avx512::fused_forward(p);
#else
  with_dtype(p.keys.dtype, [&](auto* key) { forward<std::remove_pointer_t<decltype(key)>, Float32>(p); });
#endif
}

void fused_counts(const FusedCountsParams& p) {
#ifdef __AVX512BF16__
  if (p.keys.dtype == DType::kBFloat16) return counts<BFloat16, BFloat16Pair>(p);
  avx512::fused_counts(p);
#else
  with_dtype(p.keys.dtype, [&](auto* key) { counts<std::remove_pointer_t<decltype(key)>, Float32>(p); });
#endif
}

}  // namespace PXC_ISA
}  // namespace pxc::cpu
