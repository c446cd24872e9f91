// exp2, log1p and what is made of them, as straight-line code that the compiler vectorises. A loop with a
// call in it would stay scalar, so none is left to what the compiler thinks worth inlining. Errors are
// measured in `tests/test_vector_math.py`: below 2 ulp where results are normal. NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^x. Results below 2^-126 become 0, and those from 2^127.5 up become inf. Adding 1.5 * 2^23 rounds x to an
// integer, which is then in the low bits of the sum.
[[gnu::always_inline]] inline float exp2(float x) {
  constexpr float kRounder = 0x1.8p23f;
  x = x < -127.f ? -127.f : x;  // in this order both clamps let NaN through
  x = x > 128.f ? 128.f : x;
  const float shifted = x + kRounder;
  const float f = x - (shifted - kRounder);  // in [-1/2, 1/2]
  float y = 1.535336350e-4f;                 // minimax for 2^f, relative error 2e-9
  y = y * f + 1.339887444e-3f;
  y = y * f + 9.618437351e-3f;
  y = y * f + 5.550332471e-2f;
  y = y * f + 2.402264791e-1f;
  y = y * f + 6.931472029e-1f;
  y = y * f + 1.f;
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) + 127u;
  return y * __builtin_bit_cast(float, exponent << 23);
}

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)): exact in the limit of small e.
[[gnu::always_inline]] inline float log1p(float e) {
  const float z = e / (2.f + e), w = z * z;
  float y = 2.f / 15.f;
  y = y * w + 2.f / 13.f;
  y = y * w + 2.f / 11.f;
  y = y * w + 2.f / 9.f;
  y = y * w + 2.f / 7.f;
  y = y * w + 2.f / 5.f;
  y = y * w + 2.f / 3.f;
  y = y * w + 2.f;
  return y * z;
}

// softplus and sigmoid of u, given in units of log2.
[[gnu::always_inline]] inline void softplus_sigmoid(float u_log2, float* softplus, float* sigmoid) {
  const float e = exp2(-std::fabs(u_log2));
  const float r = 1.f / (1.f + e);
  *softplus = (u_log2 > 0.f ? u_log2 * kLn2 : 0.f) + log1p(e);
  *sigmoid = u_log2 > 0.f ? r : e * r;
}

}  // namespace
}  // namespace PXC_ISA
}  // namespace pxc::cpu
