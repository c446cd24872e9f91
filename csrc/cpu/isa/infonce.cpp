// The steps of InfoNCE between the matrix products. Those are torch's, and leave a tile of dot products in
// cache. Each step reads that tile once or twice and writes it once, in place, so that it can enter the next
// product.
//
// The anchors are sorted by class, so "own class" is a range. Pass 1 (negatives) keeps a running sum of
// exp2((dot product - shift) * scale) per anchor.
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

// Whether so many elements are worth waking threads for.
bool is_large(int64_t size) { return size > int64_t(1) << 15; }

template <class In>
void widen_rows(const WidenParams& p) {
  const In* source = static_cast<const In*>(p.source.data);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (is_large(p.num_rows * p.channels))
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
  for (int64_t i = 0; i < p.num_rows; ++i)
    count_row(p, i, p.scores + i * p.num_keys, p.counts + i * kScoreBins);
}

void finish(const FinishParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (is_large(p.num_rows * p.channels))
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const int64_t row = p.anchor_index[i], count = p.pos_counts[i];
    const double per_positive = count > 0 ? 1.0 / double(count) : 0.0;
    const bool has_negative = p.sum[i] != 0.f;  // NaN counts as one
    p.neg_lse[row] =
        has_negative
            ? float((double(p.shift[i]) * p.scale + std::log2(double(p.sum[i]))) * 0.6931471805599453)
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

void score_gradients(const ScoreGradientParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < p.num_rows; ++i) {
    if (p.row_labels[i] < 0) {
      for (int64_t j = 0; j < p.num_anchors; ++j) p.scores[i * p.num_anchors + j] = 0.f;
    } else {
      float* scores = p.scores + i * p.num_anchors;
      p.row_neg_lse_log2 ? score_gradients_row<true>(p, i, scores, true)
                         : score_gradients_row<false>(p, i, scores, true);
    }
  }
}

}  // namespace PXC_ISA
}  // namespace pxc::cpu
