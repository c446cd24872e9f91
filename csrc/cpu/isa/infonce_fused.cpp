// The forward of InfoNCE with matrix products of its own. For a block of anchors and a tile of keys, the dot
// products, the weights computed from them and the second product stay in the core's own cache. All threads
// together pack the keys of a tile, once for both products. One parallel region serves a whole call.
//
// Both products read rows as 32-bit words of one fp32 or two bf16 elements. A step takes one word of every
// row, and a panel holds the words of 32 columns step by step, so one loop serves both products and both
// element types.
//
// Every thread owns a share of the anchors, and no sum crosses threads: results do not depend on their
// number. This file is compiled for AVX-512 (fp32 products) and for AVX512-BF16 (bf16 products); nothing in
// it may be shared with another translation unit: no standard templates.
#include <immintrin.h>
#include <omp.h>

#include <cmath>

#include "../cpu.h"
#include "../half.h"
#include "infonce_rows.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

// 12 x 2 vectors of sums and their operands fit the 32 registers.
constexpr int kBlockA = 12, kBlockK = kFusedBlockK;

using Word = uint32_t __attribute__((__may_alias__));

__mmask16 first_lanes(int64_t n) { return _cvtu32_mask16(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1); }

// fp32 products; keys of a narrower type are widened on their way into a panel.
struct Float32 {
  using Element = float;
  static constexpr int kPerWord = 1;

  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static Word word(const float* element, int64_t) { return __builtin_bit_cast(Word, *element); }
};

#ifdef __AVX512BF16__
// bf16 products with fp32 sums. These instructions treat subnormal numbers as 0 and round to nearest,
// whatever the mode of the processor.
struct BFloat16Pair {
  using Element = BFloat16;
  static constexpr int kPerWord = 2;

  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Word word(const BFloat16* element, int64_t stride) {
    return Word(element[0].bits) | Word(element[stride].bits) << 16;
  }
  // Returns the sum of the rounded weights. A zero after the last one completes its pair. (The maskz
  // forms, with all lanes set, are used because GCC's headers define them without a warning.)
  static float round(const float* weights, int64_t n, BFloat16* rounded) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) {
      const __m512 weight = _mm512_maskz_loadu_ps(first_lanes(n - j), weights + j);
      const __m256i bits = (__m256i)_mm512_cvtneps_pbh(weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + j), bits);
      const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, bits);
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16)));
    }
    float lanes[16], total = 0.f;
    _mm512_storeu_ps(lanes, sum);
    for (const float lane : lanes) total += lane;
    return total;
  }
};
#endif

template <class Key>
void convert(const Key* from, float* to) {
  *to = load(from);
}
[[maybe_unused]] void convert(const BFloat16* from, BFloat16* to) { *to = *from; }

// out[Rows, columns] = rows · panel, or += .
struct Product {
  const Word* rows;
  int64_t row_words;
  const Word* panel;  // [steps, kPanel]
  int64_t steps;
  float* out;
  int64_t out_stride;
  int64_t columns;
  bool accumulate;
};

template <class Multiply, int Rows>
void multiply_rows(const Product& p) {
  const __mmask16 masks[2] = {first_lanes(p.columns), first_lanes(p.columns - 16)};
  __m512 sums[Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  const Word *rows = p.rows, *panel = p.panel;
  for (int64_t k = 0; k < p.steps; ++k) {
    const __m512i columns[2] = {_mm512_loadu_si512(panel + k * kPanel),
                                _mm512_loadu_si512(panel + k * kPanel + 16)};
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512i word = _mm512_set1_epi32(int(rows[r * p.row_words + k]));
      sums[r][0] = Multiply::multiply_add(word, columns[0], sums[r][0]);
      sums[r][1] = Multiply::multiply_add(word, columns[1], sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* out = p.out + r * p.out_stride + 16 * v;
      // Each tile is summed separately: one chain of additions over all keys would lose more digits the more
      // keys there are.
      if (p.accumulate) sums[r][v] = _mm512_add_ps(sums[r][v], _mm512_maskz_loadu_ps(masks[v], out));
      _mm512_mask_storeu_ps(out, masks[v], sums[r][v]);
    }
  }
}

template <class Multiply, int Rows = kBlockA>
void multiply(int64_t rows, const Product& p) {
  if (rows == Rows) {
    multiply_rows<Multiply, Rows>(p);
  } else if constexpr (Rows > 1) {
    multiply<Multiply, Rows - 1>(rows, p);
  }
}

// Keys that are multiplied together.
struct Tile {
  int64_t count;
  int64_t keys[kBlockK];
  int32_t labels[kBlockK];
};

// The keys of a tile as panels of both products.
struct Panels {
  Word* keys;      // [kBlockK / kPanel][words of a row, kPanel]
  Word* channels;  // [channels / kPanel, rounded up][kBlockK / kPerWord, kPanel]; null without gradient
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
      const Panels panels = pack(p_.negative_keys.data);
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
    for (int64_t start = 0; start < p_.num_rows;) {
      const int32_t label = p_.anchor_labels[start];
      const Range own = anchors_of(label);
      start = own.stop;
      for (Cursor cursor{0, 0}; collect(label, cursor);) {
        const Panels panels = pack(p_.keys.data);
        share(own, 0, own.stop - own.start, [&](Range rows) { block(rows, panels); });
      }
    }
  }

  const Tile& tile() const { return tile_; }
  float* scores(int64_t row) { return scores_[row]; }

  void multiply_anchors(Range rows, const Panels& panels) {
    const Word* anchors = static_cast<const Word*>(p_.anchors.data) + rows.start * words_;
    for (int64_t first = 0; first < tile_.count; first += kPanel) {
      multiply<Multiply>(rows.stop - rows.start, {anchors, words_, panels.keys + first * words_, words_,
                                                  scores_[0] + first, kBlockK, kPanel, false});
    }
  }

  // output[rows, D] += weights · keys
  void add_keys(Range rows, const void* weights, const Panels& panels, float* output) {
    constexpr int64_t kSteps = kBlockK / Multiply::kPerWord;
    const int64_t steps = (tile_.count + Multiply::kPerWord - 1) / Multiply::kPerWord;
    for (int64_t channel = 0; channel < p_.channels; channel += kPanel) {
      multiply<Multiply>(
          rows.stop - rows.start,
          {static_cast<const Word*>(weights), kSteps, panels.channels + channel * kSteps, steps,
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

  Range anchors_of(int64_t label) const {
    Range range{0, 0};
    while (range.start < p_.num_rows && p_.anchor_labels[range.start] < label) ++range.start;
    range.stop = range.start;
    while (range.stop < p_.num_rows && p_.anchor_labels[range.stop] == label) ++range.stop;
    return range;
  }

  // Visits this thread's part of `rows`, in blocks of even size. The threads share `total` rows evenly;
  // `rows` come after the first `before` of them.
  template <class Visit>
  void share(Range rows, int64_t before, int64_t total, Visit visit) {
    const int64_t shift = rows.start - before;
    int64_t start = total * thread_ / num_threads_ + shift,
            stop = total * (thread_ + 1) / num_threads_ + shift;
    if (start < rows.start) start = rows.start;
    if (stop > rows.stop) stop = rows.stop;
    if (start >= stop) return;
    const int64_t blocks = (stop - start + kBlockA - 1) / kBlockA;
    for (int64_t i = 0; i < blocks; ++i) {
      visit(Range{start + (stop - start) * i / blocks, start + (stop - start) * (i + 1) / blocks});
    }
  }

  // Two buffers alternate, so that a thread which is done with a tile may pack the next one while others
  // still read this one.
  Panels pack(const void* keys) {
    const int64_t key_words = kBlockK * words_;
    const int64_t channel_words =
        with_gradient_ ? channel_panels_ * kPanel * (kBlockK / Multiply::kPerWord) : 0;
    turn_ ^= 1;
    Word* buffer = static_cast<Word*>(p_.panels.data) + turn_ * (key_words + channel_words);
    const Panels panels{buffer, with_gradient_ ? buffer + key_words : nullptr};
    for (int64_t first = kPanel * thread_; first < tile_.count; first += kPanel * num_threads_) {
      for (int64_t channel = 0; channel < p_.channels; channel += kPanel)
        pack_square(static_cast<const Key*>(keys), first, channel, panels);
    }
#pragma omp barrier
    return panels;
  }

  // Packs 32 keys by 32 channels, with zeros where there are fewer.
  void pack_square(const Key* all_keys, int64_t first, int64_t channel, const Panels& panels) {
    constexpr int kWords = kPanel / Multiply::kPerWord;
    typename Multiply::Element square[kPanel][kPanel] = {};
    const Key* keys = all_keys + channel;
    const int64_t num_keys = tile_.count - first < kPanel ? tile_.count - first : kPanel;
    const int64_t num_channels = p_.channels - channel < kPanel ? p_.channels - channel : kPanel;
    for (int64_t j = 0; j < num_keys; ++j) {
      const Key* key = keys + tile_.keys[first + j] * p_.channels;
      _mm_prefetch(reinterpret_cast<const char*>(key + kPanel), _MM_HINT_T0);  // of the next square
      for (int64_t d = 0; d < num_channels; ++d) convert(key + d, &square[j][d]);
    }
    const int64_t word = channel / Multiply::kPerWord;
    const int64_t num_words = words_ - word < kWords ? words_ - word : kWords;
    Word* to = panels.keys + first * words_ + word * kPanel;
    for (int64_t w = 0; w < num_words; ++w) {
      for (int64_t j = 0; j < kPanel; ++j)
        to[w * kPanel + j] = Multiply::word(&square[j][w * Multiply::kPerWord], 1);
    }
    if (!panels.channels) return;
    to = panels.channels + channel * (kBlockK / Multiply::kPerWord) + first / Multiply::kPerWord * kPanel;
    for (int64_t w = 0; w < kWords; ++w) {
      for (int64_t d = 0; d < kPanel; ++d)
        to[w * kPanel + d] = Multiply::word(&square[w * Multiply::kPerWord][d], kPanel);
    }
  }

  const FusedRows& p_;
  const bool with_gradient_;
  const int64_t words_, channel_panels_, thread_, num_threads_;
  int turn_ = 0;
  Tile tile_;
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
        if (p_.shift[i] != shifts[row]) p_.weight_sum[i] *= exp2(shifts[row] - p_.shift[i]);
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
                            .neg_lse_log2 = p_.neg_lse_log2,
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
    if constexpr (Multiply::kPerWord == 1) {
      walk_.add_keys(rows, walk_.scores(0), panels, p_.positives);
    } else {
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
    for (int64_t i = 0; i < p.num_rows; ++i)
      p.neg_lse_log2[i] = float(p.shift[i] + std::log2(double(p.sum[i])));
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
                                       .counts = counts,
                                       .threads = 1};
      for (int64_t i = rows.start; i < rows.stop; ++i) count_row(of_block, i, walk.scores(i - rows.start));
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
