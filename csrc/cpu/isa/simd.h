// Vectors of floats and of 32-bit words for the matrix products: 16 lanes with AVX-512, 8 with AVX2. What is
// written with them is compiled for either.
//
// The maskz forms, with all lanes set, are used because GCC's headers define them without a warning.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../half.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

using Word = uint32_t __attribute__((__may_alias__));

#ifdef __AVX512F__

constexpr int kWidth = 16;
constexpr int kRegisters = 32;
using Vector = __m512;
using Words = __m512i;

// The first n lanes: a load or a store touches no memory beyond them.
struct Lanes {
  __mmask16 mask;
  explicit Lanes(int64_t n) : mask(_cvtu32_mask16(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1)) {}
};

inline Vector zeros() { return _mm512_setzero_ps(); }
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector load_vector(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes.mask, from); }
inline void store_vector(float* to, Lanes lanes, Vector value) {
  _mm512_mask_storeu_ps(to, lanes.mask, value);
}
inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline void store_words(void* to, Words words) { _mm512_storeu_si512(to, words); }
inline Words all(Word word) { return _mm512_set1_epi32(int(word)); }
inline Vector as_floats(Words words) { return _mm512_castsi512_ps(words); }

[[maybe_unused]] Vector load_vector(const BFloat16* from, Lanes lanes) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lanes.mask, from));
  return as_floats(_mm512_maskz_slli_epi32(0xffff, bits, 16));
}
[[maybe_unused]] Vector load_vector(const Half* from, Lanes lanes) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(lanes.mask, from));
}

[[maybe_unused]] __m256 halves_of(Vector value) {
  return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, value, 0),
                       _mm512_maskz_extractf32x8_ps(0xff, value, 1));
}

// to[16, 16] = the transpose of 16 rows of 16 words; row(i) is row i.
template <class Row>
void transpose(Row row, Word* to, int64_t to_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load_words(row(i));
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
    store_words(to + k * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even_rest, 0x88));
    store_words(to + (k + 4) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd_rest, 0x88));
    store_words(to + (k + 8) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even_rest, 0xdd));
    store_words(to + (k + 12) * to_stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd_rest, 0xdd));
  }
}

#else  // AVX2

constexpr int kWidth = 8;
constexpr int kRegisters = 16;
using Vector = __m256;
using Words = __m256i;

struct Lanes {
  int64_t count;
  __m256i mask;
  explicit Lanes(int64_t n)
      : count(n < 0   ? 0
              : n > 8 ? 8
                      : n),
        mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
};

inline Vector zeros() { return _mm256_setzero_ps(); }
inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
inline Vector load_vector(const float* from, Lanes lanes) { return _mm256_maskload_ps(from, lanes.mask); }
inline void store_vector(float* to, Lanes lanes, Vector value) { _mm256_maskstore_ps(to, lanes.mask, value); }
inline Words load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store_words(void* to, Words words) { _mm256_storeu_si256(static_cast<__m256i*>(to), words); }
inline Words all(Word word) { return _mm256_set1_epi32(int(word)); }
inline Vector as_floats(Words words) { return _mm256_castsi256_ps(words); }

// There is no masked load of 16-bit lanes.
[[maybe_unused]] __m128i load_halves(const void* from, Lanes lanes) {
  if (lanes.count == 8) return _mm_loadu_si128(static_cast<const __m128i*>(from));
  alignas(16) uint16_t bits[8] = {};
  std::memcpy(bits, from, size_t(lanes.count) * sizeof *bits);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(bits));
}
[[maybe_unused]] Vector load_vector(const BFloat16* from, Lanes lanes) {
  return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(from, lanes)), 16));
}
[[maybe_unused]] Vector load_vector(const Half* from, Lanes lanes) {
  return _mm256_cvtph_ps(load_halves(from, lanes));
}

[[maybe_unused]] __m256 halves_of(Vector value) { return value; }

// to[8, 8] = the transpose of 8 rows of 8 words; row(i) is row i.
template <class Row>
void transpose(Row row, Word* to, int64_t to_stride) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load_words(row(i));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // pairs of rows, word by word
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // four rows; vector 4 i + k has columns k and k + 4
    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    store_words(to + k * to_stride, _mm256_permute2x128_si256(a[k], a[4 + k], 0x20));
    store_words(to + (k + 4) * to_stride, _mm256_permute2x128_si256(a[k], a[4 + k], 0x31));
  }
}

#endif

[[maybe_unused]] float sum_of(Vector value) {
  const __m256 half = halves_of(value);
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

}  // namespace
}  // namespace PXC_ISA
}  // namespace pxc::cpu
