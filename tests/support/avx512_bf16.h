// AVX512-BF16 for processors that have AVX-512 without it: included before all else, it stands in for the two
// instructions that the kernels of that instruction set take, so that `make test-bf16` can run them.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>

static inline __m512 emulated_dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  const auto first = [](__m512bh pairs) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, (__m512i)pairs, 16));
  };
  const auto second = [&](__m512bh pairs) {
    return _mm512_castsi512_ps(_mm512_maskz_and_epi32(0xffff, (__m512i)pairs, high));
  };
  return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), sum));
}

static inline __m256bh emulated_cvtneps(__m512 values) {
  alignas(64) unsigned bits[16];
  alignas(32) unsigned short rounded[16];
  _mm512_store_ps(bits, values);
  for (int i = 0; i < 16; ++i) {
    const bool is_nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    const unsigned nearest = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
    rounded[i] = (unsigned short)(is_nan ? (bits[i] >> 16) | 0x40u : nearest);
  }
  return (__m256bh)_mm256_load_si256((const __m256i*)rounded);
}

#define _mm512_dpbf16_ps emulated_dpbf16
#define _mm512_cvtneps_pbh emulated_cvtneps
#endif

#define __builtin_cpu_supports(feature) \
  (__builtin_strcmp(feature, "avx512bf16") == 0 || __builtin_cpu_supports(feature))
