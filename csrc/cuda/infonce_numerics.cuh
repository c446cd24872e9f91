// Units and ranges of InfoNCE's numbers, and how its weights fit into 16 bits.
#pragma once

#include <type_traits>

#include "../portable.h"

namespace pxc::cuda {

constexpr float kLog2E = 1.442695040888963407f;
constexpr float kLn2 = 0.693147180559945309f;

// Of scores: -inf times 0 would be NaN.
constexpr float kSmallestScale = 1e-37f;

// The shift of pass 1 lags behind the maximum by less than this, so that few tiles rescale the output.
constexpr float kSlack = 8.f;

// Weights and planes of fp16 are at most 2^kHalfExponent.
constexpr int kHalfExponent = 15;

// The constants below are of an element type's arithmetic: a Math or a Tile.

// fp16 weights of pass 1 are multiplied by 2^kWeightBias: with the slack the largest is 2^kHalfExponent, and
// few are subnormal. So is its sum, and eq. (1) takes the bias off again.
template <class Math>
constexpr float kWeightBias = std::is_same_v<typename Math::Element, Half> ? kHalfExponent - kSlack : 0.f;
// Likewise for sigma, which is at most 1, and small once an anchor's class has been learnt. Its G is divided
// by 2^kSigmaBias at the end.
template <class Math>
constexpr int kSigmaBias = std::is_same_v<typename Math::Element, Half> ? kHalfExponent : 0;

// Rounding a weight to bf16 costs up to 2e-3. That averages out over many different weights, but not where
// all are nearly equal (sigma within a class) or few (the anchors behind one key's gradient): those passes
// use two bf16 parts per weight, pass 1 one.
template <class Math>
constexpr int kWeightParts = Math::kPlanes == 2 || std::is_same_v<typename Math::Element, BFloat16> ? 2 : 1;
template <class Math>
constexpr int kNegativeParts = Math::kPlanes;

__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}

}  // namespace pxc::cuda
