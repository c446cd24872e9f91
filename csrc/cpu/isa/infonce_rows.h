// What InfoNCE does to the dot products of one anchor with some keys, before they enter the second product:
// in place, in cache. `infonce.cpp` calls it between torch's products, `infonce_fused.cpp` between its own.
//
// The shift of pass 1 follows the running maximum lazily: it moves only once the maximum has outgrown it by
// kSlack, because every move rescales a row of O. It is a dot product as they are, and subtracted before the
// scale is applied: of huge products a compiler that fuses the scale with the subtraction would leave
// rounding errors, and hide an overflow. Any shift gives the same result as long as nothing overflows, and
// 2^kSlack times the number of keys is far from that. Pass 2 takes the log-sum-exp as the shift and the
// logarithm of the sum, for the same reason.
#pragma once

#include <cmath>
#include <cstring>

#include "../../params.h"
#include "vector_math.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

constexpr float kSlack = 8.f;

// Masked: keys of the anchor's own class count as nothing. Mined: so do dot products below `least`.
template <bool Masked, bool Mined>
float row_maximum(const float* scores, int64_t n, const int32_t* key_labels, int32_t label, float least) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    float score = scores[j];
    if (Mined) score = score < least ? -INFINITY : score;
    if (Masked) score = key_labels[j] == label ? -INFINITY : score;
    maximum = score > maximum ? score : maximum;
  }
  return maximum;
}

template <bool Masked, bool Mined>
float exponentials(float* scores, int64_t n, const int32_t* key_labels, int32_t label, float least,
                   float scale, float shift) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    float weight = exp2((scores[j] - shift) * scale);
    if (Mined) weight = scores[j] < least ? 0.f : weight;
    if (Masked) weight = key_labels[j] == label ? 0.f : weight;
    scores[j] = weight;
    sum += weight;
  }
  return sum;
}

template <bool Masked, bool Mined>
void negatives_row(const NegativesParams& p, int64_t i, float* scores) {
  const int32_t label = Masked ? p.anchor_labels[i] : -1;
  const float least = Mined ? p.neg_min[i] : 0.f;
  const float maximum = row_maximum<Masked, Mined>(scores, p.num_keys, p.key_labels, label, least);
  if ((maximum - p.shift[i]) * p.scale > kSlack || (p.shift[i] == -INFINITY && maximum > -INFINITY)) {
    const float factor = exp2((p.shift[i] - maximum) * p.scale);
    p.shift[i] = maximum;
    p.sum[i] *= factor;
    if (p.output) {
      float* output = p.output + i * p.channels;
#pragma omp simd
      for (int64_t d = 0; d < p.channels; ++d) output[d] *= factor;
    }
  }
  // No finite score yet: any shift will do, and -inf - -inf would not.
  const float shift = p.shift[i] == -INFINITY ? 0.f : p.shift[i];
  p.sum[i] += exponentials<Masked, Mined>(scores, p.num_keys, p.key_labels, label, least, p.scale, shift);
}

inline void negatives_row(const NegativesParams& p, int64_t i, float* scores) {
  if (p.neg_min) {
    p.key_labels ? negatives_row<true, true>(p, i, scores) : negatives_row<false, true>(p, i, scores);
  } else {
    p.key_labels ? negatives_row<true, false>(p, i, scores) : negatives_row<false, false>(p, i, scores);
  }
}

// At most one key is the anchor itself; -1 if none is.
inline int64_t find_self(const int64_t* anchor_index, int64_t i, const int64_t* key_index, int64_t num_keys) {
  int64_t self = -1;
  for (int64_t j = 0; anchor_index && j < num_keys; ++j) {
    if (key_index[j] == anchor_index[i]) self = j;
  }
  return self;
}

template <bool Mined>
void positives_row(const PositivesParams& p, int64_t i, float* scores) {
  // 32-bit integers have as many lanes as floats.
  const int32_t num_keys = int32_t(p.num_keys);
  const int32_t self = int32_t(find_self(p.anchor_index, i, p.key_index, p.num_keys));
  const float shift = p.shift[i], sum_log2 = p.sum_log2[i], end = Mined ? p.pos_max[i] : INFINITY;
  float loss = 0.f, weight = 0.f;
  int32_t left_out = 0;
#pragma omp simd reduction(+ : loss, weight, left_out)
  for (int32_t j = 0; j < num_keys; ++j) {
    float softplus, sigmoid;
    softplus_sigmoid((shift - scores[j]) * p.scale + sum_log2, &softplus, &sigmoid);
    const int32_t out = Mined ? (j == self) | (scores[j] >= end) : j == self;
    softplus = out ? 0.f : softplus;
    sigmoid = out ? 0.f : sigmoid;
    scores[j] = sigmoid;
    loss += softplus;
    weight += sigmoid;
    left_out += out;
  }
  p.loss_sum[i] += double(loss);
  p.pos_weight_sum[i] += double(weight);
  p.pos_counts[i] += num_keys - left_out;
}

inline void positives_row(const PositivesParams& p, int64_t i, float* scores) {
  p.pos_max ? positives_row<true>(p, i, scores) : positives_row<false>(p, i, scores);
}

// Bins have exact edges, so that a dot product is in bin b or above exactly if it is at least the lower edge
// of b. NaN is in the first. Neighbours are counted apart: two in the same bin would wait for each other.
inline void count_row(const CountScoresParams& p, int64_t i, const float* scores, int32_t* counts) {
  constexpr int kHalf = kScoreBins / 2, kApart = 4, kNowhere = kScoreBins;
  constexpr int32_t kChunk = 256;
  const int32_t num_keys = int32_t(p.num_keys), label = p.anchor_labels[i];
  const int32_t self = int32_t(find_self(p.anchor_index, i, p.key_index, p.num_keys));
  const bool few = num_keys < kScoreBins;  // to clear and to add up four sets of bins would take longer
  int32_t found[kApart][kScoreBins + 16];
  if (!few) std::memset(found, 0, sizeof found);
  int32_t bins[kChunk];
  for (int32_t first = 0; first < num_keys; first += kChunk) {
    const int32_t n = num_keys - first < kChunk ? num_keys - first : kChunk;
#pragma omp simd
    for (int32_t j = 0; j < n; ++j) {
      float place = scores[first + j] * kHalf;
      place = place >= -kHalf ? place : -kHalf;
      place = place < kHalf ? place : kHalf - 1;
      int32_t bin = int32_t(place + kHalf);
      bin -= float(bin - kHalf) > place;  // where the sum was rounded up
      bins[j] = first + j == self ? kNowhere : bin;
    }
    if (p.key_labels) {
#pragma omp simd
      for (int32_t j = 0; j < n; ++j) bins[j] = p.key_labels[first + j] == label ? kNowhere : bins[j];
    }
    if (few) {
      for (int32_t j = 0; j < n; ++j) {
        if (bins[j] != kNowhere) ++counts[bins[j]];
      }
      continue;
    }
    int32_t j = 0;
    for (; j + kApart <= n; j += kApart) {
      for (int k = 0; k < kApart; ++k) ++found[k][bins[j + k]];
    }
    for (; j < n; ++j) ++found[0][bins[j]];
  }
  if (few) return;
#pragma omp simd
  for (int bin = 0; bin < kScoreBins; ++bin) {
    counts[bin] += found[0][bin] + found[1][bin] + found[2][bin] + found[3][bin];
  }
}

// ds of eq. (5) for one logit, seen from one anchor.
inline float score_gradient(float score_log2, bool positive, float neg_lse_log2, float push, float pull) {
  const float u = neg_lse_log2 - score_log2;
  const float e = exp2(positive ? -std::fabs(u) : -u);
  const float r = 1.f / (1.f + e);
  return positive ? -pull * (u > 0.f ? r : e * r) : push * e;
}

// ds of a pair that takes part, else 0. A chain of selections, which gcc makes vectors of, unlike of
// conditions.
inline float taking_part(float dot, bool positive, float neg_min, float pos_max, float ds) {
  const float of_negative = dot < neg_min ? 0.f : ds, of_positive = dot >= pos_max ? 0.f : ds;
  return positive ? of_positive : of_negative;
}

// Mixed: some anchors are of the row's own class.
template <bool Symmetric, bool Mined, bool Mixed>
void score_gradients_row(const ScoreGradientParams& p, int64_t i, float* scores) {
  const int32_t label = Mixed ? p.row_labels[i] : 0;
  const float row_neg_lse_log2 = Symmetric ? p.row_neg_lse_log2[i] : 0.f;
  const float row_push = Symmetric ? p.row_push[i] : 0.f;
  const float row_pull = Symmetric ? p.row_pull[i] : 0.f;
  const float row_neg_min = Symmetric && Mined ? p.row_neg_min[i] : 0.f;
  const float row_pos_max = Symmetric && Mined ? p.row_pos_max[i] : 0.f;
  // Both bounds are loaded whatever the pair is: a load under a condition would keep this from being a
  // vector's.
  const float* neg_min = Mined ? p.neg_min : p.push;
  const float* pos_max = Mined ? p.pos_max : p.push;
#pragma omp simd
  for (int64_t j = 0; j < p.num_anchors; ++j) {
    const float dot = scores[j], score = dot * p.scale, low = neg_min[j], high = pos_max[j];
    const bool positive = Mixed && p.anchor_labels[j] == label;
    float ds = score_gradient(score, positive, p.neg_lse_log2[j], p.push[j], p.pull[j]);
    if (Mined) ds = taking_part(dot, positive, low, high, ds);
    if (Symmetric) {
      float mirror = score_gradient(score, positive, row_neg_lse_log2, row_push, row_pull);
      if (Mined) mirror = taking_part(dot, positive, row_neg_min, row_pos_max, mirror);
      ds += mirror;
    }
    scores[j] = ds;
  }
  for (int64_t j = 0; Mixed && p.row_index && j < p.num_anchors; ++j) {
    if (p.anchor_index[j] == p.row_index[i] && p.anchor_labels[j] == label) scores[j] = 0.f;
  }
}

template <bool Symmetric>
void score_gradients_row(const ScoreGradientParams& p, int64_t i, float* scores, bool mixed) {
  if (p.neg_min) {
    mixed ? score_gradients_row<Symmetric, true, true>(p, i, scores)
          : score_gradients_row<Symmetric, true, false>(p, i, scores);
  } else {
    mixed ? score_gradients_row<Symmetric, false, true>(p, i, scores)
          : score_gradients_row<Symmetric, false, false>(p, i, scores);
  }
}

}  // namespace
}  // namespace PXC_ISA
}  // namespace pxc::cpu
