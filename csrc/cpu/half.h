// fp16 and bf16 as plain 16-bit words, converted in integer arithmetic: no compiler extension needed, and
// the same rounding (to nearest, ties to even) everywhere.
#pragma once

#include <cstdint>

#include "../params.h"

namespace pxc::cpu {
namespace {  // a copy per translation unit: these are compiled for several instruction sets

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const BFloat16* p) { return __builtin_bit_cast(float, uint32_t(p->bits) << 16); }

// Subnormal ones too where the processor is set to take subnormal fp32 numbers for 0, as some threads may be:
// there is none on the way.
inline float load(const Half* p) {
  const uint32_t magnitude = p->bits & 0x7fffu;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, float(int32_t(magnitude)) * 0x1p-24f);
  uint32_t bits =
      magnitude < 0x400u ? subnormal : (magnitude << 13) + 0x38000000u;  // exponent bias 15 -> 127
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;                       // inf and NaN
  return __builtin_bit_cast(float, bits | uint32_t(p->bits & 0x8000u) << 16);
}

inline void store(float* p, float value) { *p = value; }

inline void store(BFloat16* p, float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = uint16_t(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(Half* p, float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and more; what rounds up to 65536 carries into inf below
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded result in the low bits
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  p->bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// Calls visit with a null pointer of the element type.
template <class Visit>
inline void with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return visit(static_cast<BFloat16*>(nullptr));
    default:
      return;  // the seam lets nothing else through
  }
}

}  // namespace
}  // namespace pxc::cpu
