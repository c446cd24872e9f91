// What InfoNCE does to the dot products of one anchor with some keys, before they enter the second product:
// in place, in cache. `infonce.cpp` calls it between torch's products, `infonce_fused.cpp` between its own.
//
// The shift of pass 1 follows the running maximum lazily: it moves only once the maximum has outgrown it by
// kSlack, because every move rescales a row of O. Any shift gives the same result as long as nothing
// overflows, and 2^kSlack times the number of keys is far from that.
#pragma once

#include <cmath>

#include "../../params.h"
#include "vector_math.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

constexpr float kSlack = 8.f;

// Masked: keys of the anchor's own class are left out.
template <bool Masked>
float row_maximum(const float* scores, int64_t n, const int32_t* key_labels, int32_t label) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    float score = scores[j];
    if (Masked) score = key_labels[j] == label ? -INFINITY : score;
    maximum = score > maximum ? score : maximum;
  }
  return maximum;
}

template <bool Masked>
float exponentials(float* scores, int64_t n, const int32_t* key_labels, int32_t label, float scale,
                   float shift) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    float weight = exp2(scores[j] * scale - shift);
    if (Masked) weight = key_labels[j] == label ? 0.f : weight;
    scores[j] = weight;
    sum += weight;
  }
  return sum;
}

template <bool Masked>
void negatives_row(const NegativesParams& p, int64_t i, float* scores) {
  const int32_t label = Masked ? p.anchor_labels[i] : -1;
  const float maximum = row_maximum<Masked>(scores, p.num_keys, p.key_labels, label) * p.scale;
  if (maximum > p.shift[i] + kSlack || (p.shift[i] == -INFINITY && maximum > -INFINITY)) {
    const float factor = exp2(p.shift[i] - maximum);
    p.shift[i] = maximum;
    p.sum[i] *= factor;
    if (p.output) {
      float* output = p.output + i * p.channels;
#pragma omp simd
      for (int64_t d = 0; d < p.channels; ++d) output[d] *= factor;
    }
  }
  // No finite score yet: any shift will do but -inf, since -inf - -inf is NaN.
  const float shift = p.shift[i] == -INFINITY ? 0.f : p.shift[i];
  p.sum[i] += exponentials<Masked>(scores, p.num_keys, p.key_labels, label, p.scale, shift);
}

inline void positives_row(const PositivesParams& p, int64_t i, float* scores) {
  int64_t self = -1;  // at most one key is the anchor itself
  for (int64_t j = 0; p.anchor_index && j < p.num_keys; ++j) {
    if (p.key_index[j] == p.anchor_index[i]) self = j;
  }
  const float neg_lse_log2 = p.neg_lse_log2[i];
  float loss = 0.f, weight = 0.f;
#pragma omp simd reduction(+ : loss, weight)
  for (int64_t j = 0; j < p.num_keys; ++j) {
    float softplus, sigmoid;
    softplus_sigmoid(neg_lse_log2 - scores[j] * p.scale, &softplus, &sigmoid);
    softplus = j == self ? 0.f : softplus;
    sigmoid = j == self ? 0.f : sigmoid;
    scores[j] = sigmoid;
    loss += softplus;
    weight += sigmoid;
  }
  p.loss_sum[i] += double(loss);
  p.pos_weight_sum[i] += double(weight);
  p.pos_counts[i] += p.num_keys - (self >= 0);
}

}  // namespace
}  // namespace PXC_ISA
}  // namespace pxc::cpu
