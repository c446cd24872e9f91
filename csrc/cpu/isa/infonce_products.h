// The matrix products of the fused InfoNCE.
//
// They read rows as 32-bit words of one fp32 or two bf16 elements. A step takes one word of every row, and a
// panel holds the words of 32 columns step by step, so one loop serves every product and both element types.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../cpu.h"
#include "../half.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

// 12 x 2 vectors of sums and their operands fit the 32 registers.
constexpr int kBlockRows = 12;

// Steps of a panel that are taken at a time by all rows: 16 KiB of it, which a core's first cache keeps.
constexpr int64_t kBlockSteps = 128;

using Word = uint32_t __attribute__((__may_alias__));

__mmask16 first_lanes(int64_t n) { return _cvtu32_mask16(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1); }

// fp32 products; keys of a narrower type are widened on their way into a panel.
struct Float32 {
  using Element = float;
  static constexpr int kPerWord = 1;

  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static Word word(const float* element, const float*) { return __builtin_bit_cast(Word, *element); }
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
  static Word word(const BFloat16* first, const BFloat16* second) {
    return Word(first->bits) | Word(second->bits) << 16;
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
      part.panel += step * kPanel;
      part.steps = p.steps - step < kBlockSteps ? p.steps - step : kBlockSteps;
      part.out += first * p.out_stride;
      part.accumulate = p.accumulate || step > 0;
      multiply_block<Multiply>(rows * (i + 1) / blocks - first, part);
    }
  }
}

// Products of so few rows with keys as they lie that to pack these would take longer. They are taken in fp32,
// whatever the type: what is read of a key is widened.

[[maybe_unused]] __m512 load_wide(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
[[maybe_unused]] __m512 load_wide(const BFloat16* from, __mmask16 lanes) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, bits, 16));
}
[[maybe_unused]] __m512 load_wide(const Half* from, __mmask16 lanes) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(lanes, from));
}

constexpr int kFewRows = 4;

[[maybe_unused]] float sum_of(__m512 lanes) {
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, lanes, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, lanes, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// out[r][j] = <rows[r], key(j)>
template <int Rows, class Element, class Key>
void dot_products(const Element* rows, int64_t row_stride, Key key, int64_t num_keys, int64_t channels,
                  float* out, int64_t out_stride) {
  for (int64_t j = 0; j < num_keys; ++j) {
    const auto* of_key = key(j);
    __m512 sums[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t d = 0; d < channels; d += 16) {
      const __mmask16 lanes = first_lanes(channels - d);
      const __m512 of_channels = load_wide(of_key + d, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        sums[r] = _mm512_fmadd_ps(load_wide(rows + r * row_stride + d, lanes), of_channels, sums[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) out[r * out_stride + j] = sum_of(sums[r]);
  }
}

// out[r] += sum over j of weights[r][j] key(j)
template <int Rows, class Key>
void add_weighted(const float* weights, int64_t weight_stride, Key key, int64_t num_keys, int64_t channels,
                  float* out) {
  constexpr int kVectors = 4;
  for (int64_t channel = 0; channel < channels; channel += 16 * kVectors) {
    __mmask16 lanes[kVectors];
    __m512 sums[Rows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      lanes[v] = first_lanes(channels - channel - 16 * v);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[r][v] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < num_keys; ++j) {
      const auto* of_key = key(j) + channel;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512 of_channels = load_wide(of_key + 16 * v, lanes[v]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          sums[r][v] =
              _mm512_fmadd_ps(_mm512_set1_ps(weights[r * weight_stride + j]), of_channels, sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * channels + channel + 16 * v;
        _mm512_mask_storeu_ps(to, lanes[v], _mm512_add_ps(sums[r][v], _mm512_maskz_loadu_ps(lanes[v], to)));
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

// to[16, 16] = the transpose of 16 rows of 16 words; load(i) is row i. Maskz forms as above.
template <class Load>
void transpose(Load load, Word* to, int64_t to_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load(i);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows, word by word
    b[2 * i] = _mm512_maskz_unpacklo_epi32(0xffff, a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // four rows; vector 4 i + k has columns k, k + 4, k + 8 and k + 12
    a[4 * i] = _mm512_maskz_unpacklo_epi64(0xff, b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_maskz_unpacklo_epi64(0xff, b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_maskz_unpackhi_epi64(0xff, b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i even = _mm512_maskz_shuffle_i32x4(0xffff, a[k], a[4 + k], 0x88);  // columns k and k + 8
    const __m512i odd = _mm512_maskz_shuffle_i32x4(0xffff, a[k], a[4 + k], 0xdd);   // k + 4 and k + 12
    const __m512i even_rest = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + k], a[12 + k], 0x88);
    const __m512i odd_rest = _mm512_maskz_shuffle_i32x4(0xffff, a[8 + k], a[12 + k], 0xdd);
    _mm512_storeu_si512(to + k * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even_rest, 0x88));
    _mm512_storeu_si512(to + (k + 4) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd_rest, 0x88));
    _mm512_storeu_si512(to + (k + 8) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even_rest, 0xdd));
    _mm512_storeu_si512(to + (k + 12) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd_rest, 0xdd));
  }
}

// Packs 32 channels of 32 rows: into the panel of the rows, and into that of the channels unless it is null.
// row(j) is where row j begins.
template <class Multiply, class Row>
void pack_whole_square(Row row, Word* of_rows, Word* of_channels) {
  constexpr int kWords = kPanel / Multiply::kPerWord;
  for (int j = 0; j < kPanel; j += 16) {
    for (int word = 0; word < kWords; word += 16) {
      const auto load = [&](int i) {
        return _mm512_loadu_si512(reinterpret_cast<const Word*>(row(j + i)) + word);
      };
      transpose(load, of_rows + word * kPanel + j, kPanel);
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
