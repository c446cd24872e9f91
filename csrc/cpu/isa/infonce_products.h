// The matrix products of the fused InfoNCE.
//
// They read rows as 32-bit words of one fp32 or two bf16 elements. A step takes one word of every row, and a
// panel holds the words of 32 columns step by step, so one loop serves every product and both element types.
#pragma once

#include "../cpu.h"
#include "../half.h"
#include "simd.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

// The sums of a block, and the operands of one of its rows, fit the registers.
constexpr int kVectors = 2, kBlockRows = kRegisters * 3 / 8;

// Steps of a panel that are taken at a time by all rows: 16 KiB of it, which a core's first cache keeps.
constexpr int64_t kBlockSteps = 128;

// fp32 products; keys of a narrower type are widened on their way into a panel.
struct Float32 {
  using Element = float;
  static constexpr int kPerWord = 1;

  static Vector multiply_add(Words a, Words b, Vector sum) {
    return PXC_ISA::multiply_add(as_floats(a), as_floats(b), sum);
  }
  static Word word(const float* element, const float*) { return __builtin_bit_cast(Word, *element); }
};

#ifdef __AVX512BF16__
// bf16 products with fp32 sums. These instructions treat subnormal numbers as 0 and round to nearest,
// whatever the mode of the processor.
struct BFloat16Pair {
  using Element = BFloat16;
  static constexpr int kPerWord = 2;

  static Vector multiply_add(Words a, Words b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Word word(const BFloat16* first, const BFloat16* second) {
    return Word(first->bits) | Word(second->bits) << 16;
  }
  // Returns the sum of the rounded weights. A zero after the last one completes its pair.
  static float round(const float* weights, int64_t n, BFloat16* rounded) {
    Vector sum = zeros();
    for (int64_t j = 0; j < n; j += kWidth) {
      const __m256i bits = (__m256i)_mm512_cvtneps_pbh(load_vector(weights + j, Lanes(n - j)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + j), bits);
      sum = add(sum, load_vector(rounded + j, Lanes(kWidth)));
    }
    return sum_of(sum);
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
  const Word* panel;  // [steps, kPanel], or as many columns of a wider matrix
  int64_t panel_stride;
  int64_t steps;
  float* out;
  int64_t out_stride;
  int64_t columns;
  bool accumulate;
};

template <class Multiply, int Rows>
void multiply_rows(const Product& p) {
  constexpr int kColumns = kVectors * kWidth;
  for (int64_t column = 0; column < kPanel && column < p.columns; column += kColumns) {
    Vector sums[Rows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = zeros();
    const Word *rows = p.rows, *panel = p.panel + column;
    for (int64_t k = 0; k < p.steps; ++k) {
      const Words columns[kVectors] = {load_words(panel + k * p.panel_stride),
                                       load_words(panel + k * p.panel_stride + kWidth)};
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const Words word = all(rows[r * p.row_words + k]);
        sums[r][0] = Multiply::multiply_add(word, columns[0], sums[r][0]);
        sums[r][1] = Multiply::multiply_add(word, columns[1], sums[r][1]);
      }
    }
    const Lanes lanes[kVectors] = {Lanes(p.columns - column), Lanes(p.columns - column - kWidth)};
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* out = p.out + r * p.out_stride + column + kWidth * v;
        // Each tile is summed separately: one chain of additions over all keys would lose more digits the
        // more keys there are.
        if (p.accumulate) sums[r][v] = add(sums[r][v], load_vector(out, lanes[v]));
        store_vector(out, lanes[v], sums[r][v]);
      }
    }
  }
}

template <class Multiply, int Rows = kBlockRows>
void multiply_block(int64_t rows, const Product& p) {
  if (rows == Rows) {
    multiply_rows<Multiply, Rows>(p);
  } else if constexpr (Rows > 1) {
    multiply_block<Multiply, Rows - 1>(rows, p);
  }
}

// Any number of rows, in blocks of even size.
template <class Multiply>
void multiply(int64_t rows, const Product& p) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t step = 0; step < p.steps; step += kBlockSteps) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = rows * i / blocks;
      Product part = p;
      part.rows += first * p.row_words + step;
      part.panel += step * p.panel_stride;
      part.steps = p.steps - step < kBlockSteps ? p.steps - step : kBlockSteps;
      part.out += first * p.out_stride;
      part.accumulate = p.accumulate || step > 0;
      multiply_block<Multiply>(rows * (i + 1) / blocks - first, part);
    }
  }
}

// Products of so few rows with keys as they lie that to pack these would take longer. They are taken in fp32,
// whatever the type: what is read of a key is widened.

constexpr int kFewRows = 4;

// out[r][j] = <rows[r], key(j)>
template <int Rows, class Element, class Key>
void dot_products(const Element* rows, int64_t row_stride, Key key, int64_t num_keys, int64_t channels,
                  float* out, int64_t out_stride) {
  for (int64_t j = 0; j < num_keys; ++j) {
    const auto* of_key = key(j);
    Vector sums[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] = zeros();
    for (int64_t d = 0; d < channels; d += kWidth) {
      const Lanes lanes(channels - d);
      const Vector of_channels = load_vector(of_key + d, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        sums[r] = multiply_add(load_vector(rows + r * row_stride + d, lanes), of_channels, sums[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) out[r * out_stride + j] = sum_of(sums[r]);
  }
}

// out[r] += sum over j of weights[r][j] key(j)
template <int Rows, class Key>
void add_weighted(const float* weights, int64_t weight_stride, Key key, int64_t num_keys, int64_t channels,
                  float* out) {
  for (int64_t channel = 0; channel < channels; channel += kVectors * kWidth) {
    const Lanes lanes[kVectors] = {Lanes(channels - channel), Lanes(channels - channel - kWidth)};
    Vector sums[Rows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = zeros();
    for (int64_t j = 0; j < num_keys; ++j) {
      const auto* of_key = key(j) + channel;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vector of_channels = load_vector(of_key + kWidth * v, lanes[v]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          sums[r][v] = multiply_add(all(weights[r * weight_stride + j]), of_channels, sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * channels + channel + kWidth * v;
        store_vector(to, lanes[v], add(sums[r][v], load_vector(to, lanes[v])));
      }
    }
  }
}

// Calls work(rows as a constant, first row) for a few rows at a time.
template <class Work>
void few_at_a_time(int64_t num_rows, Work work) {
  int64_t first = 0;
  for (; first + kFewRows <= num_rows; first += kFewRows) work.template operator()<kFewRows>(first);
  switch (num_rows - first) {
    case 3:
      return work.template operator()<3>(first);
    case 2:
      return work.template operator()<2>(first);
    case 1:
      return work.template operator()<1>(first);
  }
}

// Packs 32 channels of 32 rows: into the panel of the rows, and into that of the channels unless it is null.
// row(j) is where row j begins.
template <class Multiply, class Row>
void pack_whole_square(Row row, Word* of_rows, Word* of_channels) {
  constexpr int kWords = kPanel / Multiply::kPerWord;
  for (int j = 0; j < kPanel; j += kWidth) {
    for (int word = 0; word < kWords; word += kWidth) {
      transpose([&](int i) { return reinterpret_cast<const Word*>(row(j + i)) + word; },
                of_rows + word * kPanel + j, kPanel);
    }
  }
  for (int w = 0; of_channels && w < kWords; ++w) {
    const auto *first = row(w * Multiply::kPerWord), *last = row((w + 1) * Multiply::kPerWord - 1);
    for (int d = 0; d < kPanel; ++d) of_channels[w * kPanel + d] = Multiply::word(first + d, last + d);
  }
}

// Packs up to 32 channels of up to 32 rows, with zeros where there are fewer.
template <class Key, class Multiply, class Row>
void pack_square(Row row, int64_t num_rows, int64_t num_channels, int64_t channel, Word* of_rows,
                 Word* of_channels) {
  using Element = typename Multiply::Element;
  constexpr int kWords = kPanel / Multiply::kPerWord;
  num_rows = num_rows < kPanel ? num_rows : kPanel;
  const int64_t width = num_channels - channel < kPanel ? num_channels - channel : kPanel;
  for (int64_t j = 0; j < num_rows; ++j)  // of the next square
    _mm_prefetch(reinterpret_cast<const char*>(row(j) + channel + kPanel), _MM_HINT_T0);
  Word* to = of_rows + channel / Multiply::kPerWord * kPanel;
  if constexpr (sizeof(Key) == sizeof(Element)) {
    if (num_rows == kPanel && width == kPanel) {
      return pack_whole_square<Multiply>([&](int64_t j) { return row(j) + channel; }, to, of_channels);
    }
  }
  alignas(64) Element square[kPanel][kPanel];
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t count = j < num_rows ? width : 0;
    for (int64_t d = 0; d < count; ++d) convert(row(j) + channel + d, &square[j][d]);
    for (int64_t d = count; d < kPanel; ++d) square[j][d] = Element{};
  }
  const auto packed = [&](int64_t j) { return square[j]; };
  if (width == kPanel) return pack_whole_square<Multiply>(packed, to, of_channels);
  // A row has fewer words than a panel could take.
  alignas(64) Word panel[kWords][kPanel];
  pack_whole_square<Multiply>(packed, panel[0], of_channels);
  const int64_t words = (width + Multiply::kPerWord - 1) / Multiply::kPerWord;
  std::memcpy(to, panel, size_t(words) * sizeof panel[0]);
}

}  // namespace
}  // namespace PXC_ISA
}  // namespace pxc::cpu
