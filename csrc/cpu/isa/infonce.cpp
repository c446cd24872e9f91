// The steps of InfoNCE between the matrix products. Those are torch's, and leave a tile of dot products in
// cache. Each step reads that tile once or twice and writes it once, in place, so that it can enter the next
// product.
//
// The anchors are sorted by class, so "own class" is a range. Pass 1 (negatives) keeps a running sum of
// exp2(score - shift) per anchor.
//
// This file is compiled once for each instruction set (PXC_ISA), so nothing in it may be shared with another
// translation unit: no standard templates, only loops.
#include <cmath>

#include "../cpu.h"
#include "../half.h"
#include "infonce_rows.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

template <class In>
void widen_rows(const WidenParams& p) {
  const In* source = static_cast<const In*>(p.source.data);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const In* from = source + (p.indices ? p.indices[i] : i) * p.channels;
    float* to = p.rows + i * p.channels;
#pragma omp simd
    for (int64_t d = 0; d < p.channels; ++d) to[d] = load(from + d);
  }
}

}  // namespace

void widen(const WidenParams& p) {
  with_dtype(p.source.dtype, [&](auto* in) { widen_rows<std::remove_pointer_t<decltype(in)>>(p); });
}

void negatives(const NegativesParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) negatives_row(p, i, p.scores + i * p.num_keys);
}

void positives(const PositivesParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) positives_row(p, i, p.scores + i * p.num_keys);
}

void count_scores(const CountScoresParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) count_row(p, i, p.scores + i * p.num_keys);
}

void finish(const FinishParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const int64_t row = p.anchor_index[i], count = p.pos_counts[i];
    const double per_positive = count > 0 ? 1.0 / double(count) : 0.0;
    const bool has_negative = p.sum[i] != 0.f;  // NaN counts as one
    p.neg_lse[row] = has_negative
                         ? float((double(p.shift[i]) + std::log2(double(p.sum[i]))) * 0.6931471805599453)
                         : -INFINITY;
    p.loss[row] = count > 0 ? float(p.loss_sum[i] * per_positive) : 0.f;
    p.pos_weight[row] = float(p.pos_weight_sum[i]);
    p.pos_count[row] = int32_t(count);
    if (!p.anchor_grad) continue;
    const double per_logit = per_positive / double(p.temperature);
    const float of_positives = float(-per_logit);
    const float of_negatives =
        has_negative ? float(per_logit * p.pos_weight_sum[i] / double(p.weight_sum[i])) : 0.f;
    const float *o = p.negatives + i * p.channels, *g = p.positives + i * p.channels;
    float* grad = p.anchor_grad + row * p.channels;
    if (count == 0) {
      for (int64_t d = 0; d < p.channels; ++d) grad[d] = 0.f;
      continue;
    }
#pragma omp simd
    for (int64_t d = 0; d < p.channels; ++d) grad[d] = of_negatives * o[d] + of_positives * g[d];
  }
}

namespace {

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

template <bool Symmetric, bool Mined>
void score_gradients_row(const ScoreGradientParams& p, int64_t i) {
  float* scores = p.scores + i * p.num_anchors;
  const int32_t label = p.row_labels[i];
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
    const bool positive = p.anchor_labels[j] == label;
    float ds = score_gradient(score, positive, p.neg_lse_log2[j], p.push[j], p.pull[j]);
    if (Mined) ds = taking_part(dot, positive, low, high, ds);
    if (Symmetric) {
      float mirror = score_gradient(score, positive, row_neg_lse_log2, row_push, row_pull);
      if (Mined) mirror = taking_part(dot, positive, row_neg_min, row_pos_max, mirror);
      ds += mirror;
    }
    scores[j] = ds;
  }
  for (int64_t j = 0; p.row_index && j < p.num_anchors; ++j) {
    if (p.anchor_index[j] == p.row_index[i] && p.anchor_labels[j] == label) scores[j] = 0.f;
  }
}

}  // namespace

void score_gradients(const ScoreGradientParams& p) {
  const auto row = p.row_neg_lse_log2
                       ? (p.neg_min ? score_gradients_row<true, true> : score_gradients_row<true, false>)
                       : (p.neg_min ? score_gradients_row<false, true> : score_gradients_row<false, false>);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    if (p.row_labels[i] < 0) {
      for (int64_t j = 0; j < p.num_anchors; ++j) p.scores[i * p.num_anchors + j] = 0.f;
    } else {
      row(p, i);
    }
  }
}

}  // namespace PXC_ISA
}  // namespace pxc::cpu
