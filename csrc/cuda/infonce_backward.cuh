// The backward: the gradient of the keys, and the stage that adds up its splits.
#pragma once

#include "infonce_visits.cuh"

namespace pxc::cuda {

// A power of two that takes the largest weight to 2^10 or less. That leaves fp16 room above, as a log-sum-exp
// of other rows than these may make weights larger, and precision below, for weights a thousandth as large.
// The whole warp calls it.
__device__ __forceinline__ float weight_scale(const InfonceBackwardParams& p, int lane) {
  if (p.weight_peaks == nullptr) return 1.f;
  constexpr int kLargestExponent = 9, kSmallestPeak = -110;
  static_assert(kLargestExponent - kSmallestPeak <= 127, "the power of two is a float");
  float peak = 0.f;
  for (int64_t i = lane; i * kOrderThreads < p.num_anchors; i += kWarp) peak = fmaxf(peak, p.weight_peaks[i]);
  const int exponent = max(int(float_bits(warp_max(peak)) >> 23) - 127, kSmallestPeak);
  return power_of_two(kLargestExponent - exponent);
}

// ds of eq. (5) of one anchor.
__device__ __forceinline__ float negative_gradient(const Factors& anchor, float score) {
  return anchor.push * exp2_approx(score - anchor.neg_lse_log2);
}
__device__ __forceinline__ float positive_gradient(const Factors& anchor, float score) {
  return -anchor.pull / (1.f + exp2_approx(score - anchor.neg_lse_log2));
}

template <class Tile>
using BackwardEngine = Engine<Tile, kWeightParts<Tile>>;

// The shared memory of a block of the backward.
template <class Tile, bool kMined>
size_t backward_bytes(int64_t row_stride) {
  const size_t factors = shared_bytes<Factors>(2 * Tile::kBlockK) + shared_bytes<Factors>(Tile::kBlockA);
  const size_t bounds = shared_bytes<Bounds>(2 * Tile::kBlockK) + shared_bytes<Bounds>(Tile::kBlockA);
  return BackwardEngine<Tile>::bytes(row_stride) + factors + (kMined ? bounds : 0);
}

// The bounds of the anchors that a block of the backward meets, as its factors; nothing unless mined.
template <class Tile, class Params>
struct BoundsOfTile {
  static constexpr bool kBounded = kMined<Params>;
  [[maybe_unused]] const Bounds* all = nullptr;
  [[maybe_unused]] Bounds *columns = nullptr, *rows = nullptr;

  __device__ __forceinline__ BoundsOfTile(SharedMemory& memory, const Params& p) {
    if constexpr (kBounded) {
      all = reinterpret_cast<const Bounds*>(p.bounds);
      columns = memory.template take<Bounds>(2 * Tile::kBlockK);
      rows = memory.template take<Bounds>(Tile::kBlockA);
    }
  }
  __device__ __forceinline__ void load_row(int row, int64_t place) const {
    if constexpr (kBounded) rows[row] = all[place];
  }
  __device__ __forceinline__ void load_column(int stage, int column, int64_t place, bool inside) const {
    if constexpr (kBounded) {
      Bounds* to = columns + stage * Tile::kBlockK + column;
      const Bounds* from = inside ? all + place : all;
      cp_async_4(&to->neg_min, &from->neg_min, inside ? 4 : 0);
      cp_async_4(&to->pos_max, &from->pos_max, inside ? 4 : 0);
    }
  }
  // Whether a score takes part as a negative, or a positive, of the anchor in a column, or in a row.
  __device__ __forceinline__ bool column_takes(int stage, int column, float score, bool positive) const {
    if constexpr (kBounded) return takes(columns[stage * Tile::kBlockK + column], score, positive);
    return true;
  }
  __device__ __forceinline__ bool row_takes(int row, float score, bool positive) const {
    if constexpr (kBounded) return takes(rows[row], score, positive);
    return true;
  }

 private:
  __device__ __forceinline__ static bool takes(Bounds bounds, float score, bool positive) {
    return positive ? !(score >= bounds.pos_max) : !(score < bounds.neg_min);
  }
};

// Rows are keys and columns anchors: the gradient of the keys. Of anchors that are the keys, both halves at
// once.
template <class Tile, class Params>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) infonce_bwd_keys_kernel(Params p) {
  using Engine = BackwardEngine<Tile>;
  SharedMemory memory;
  const Side keys = keys_of<Tile>(p), anchors = anchors_of<Tile>(p);
  const Engine engine(memory, keys, anchors, int(blockIdx.x) * Tile::kBlockA);
  Factors* factors = memory.take<Factors>(2 * Tile::kBlockK);
  Factors* own_factors = memory.take<Factors>(Tile::kBlockA);  // their labels at least
  const BoundsOfTile<Tile, Params> bounds(memory, p);
  const Factors* all_factors = reinterpret_cast<const Factors*>(p.factors);
  const float scale = *p.score_scale, peak_scale = weight_scale(p, engine.lane);
  const bool symmetric = p.keys.data == nullptr;

  if (int(threadIdx.x) < Tile::kBlockA) {
    const int64_t row = engine.first_row + threadIdx.x;
    own_factors[threadIdx.x] = symmetric && row < keys.count
                                   ? all_factors[row]
                                   : Factors{.neg_lse_log2 = 0.f,
                                             .push = 0.f,
                                             .pull = 0.f,
                                             .label_bits = bits_float(uint32_t(label_at(keys, row)))};
    if (symmetric && row < keys.count) bounds.load_row(int(threadIdx.x), row);
  }
  sync_block();  // they are there, also for a block that visits nothing
  typename Engine::Output output = {};

  const LabelRange own = range_of_labelled(keys, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<Pass::kBackward, Tile> walk(p.label_ranges, anchors.count, own, int(blockIdx.y), int(gridDim.y),
                                   engine.lane);
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        if (int(threadIdx.x) >= Tile::kBlockK) return;
        const bool inside = first + threadIdx.x < anchors.count;  // zeros past the last: push and pull are 0
        cp_async_16(factors + stage * Tile::kBlockK + threadIdx.x,
                    inside ? all_factors + first + threadIdx.x : all_factors, inside ? 16 : 0);
        bounds.load_column(stage, int(threadIdx.x), first + threadIdx.x, inside);
      },
      [&](int stage, bool mixed, unsigned first_column) {
        typename Engine::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        each_score<Tile>([&](int n, int e) {
          const int column = engine.local_column(n) + e;
          const int64_t place = int64_t(first_column) + column;
          const Factors anchor = factors[stage * Tile::kBlockK + column];
          const int label = place < anchors.count ? anchor.label() : -1;
          each_row<Tile>([&](int f, int half) {
            float& score = scores[f][n][2 * half + e];
            const Factors mirror = own_factors[engine.local_row(f, half)];  // registers are short here
            const float product = score, scaled = rounded_product(score, scale);
            const bool positive = mixed && label == mirror.label();
            const bool takes = bounds.column_takes(stage, column, product, positive);
            const bool mirrored = symmetric && bounds.row_takes(engine.local_row(f, half), product, positive);
            if (!positive) {
              score = (takes ? negative_gradient(anchor, scaled) : 0.f) +
                      (mirrored ? negative_gradient(mirror, scaled) : 0.f);
            } else {
              score = (takes ? positive_gradient(anchor, scaled) : 0.f) +
                      (mirrored ? positive_gradient(mirror, scaled) : 0.f);
              const int64_t row = int64_t(engine.first_row) + engine.local_row(f, half);
              if (p.exclude_self && label >= 0 && row == (symmetric ? place : p.order[place])) score = 0.f;
            }
            // An anchor without a label has a push and pull of 0, but its mirror may be anything.
            score = mixed && label < 0 ? 0.f : score * peak_scale;
          });
        });
        engine.store_weights(scores);
        engine.accumulate(output, stage);
      });

  const float unscale = unscale_of_anchors(p) / (peak_scale * p.temperature);
  each_output<Tile>(
      [&](int f, int n, int i) {  // a row without a label takes no part, whatever the anchors hold
        const int own_label = own_factors[engine.local_row(f, i / 2)].label();
        output[f][n][i] = own_label < 0 ? 0.f : output[f][n][i] * unscale;
      });
  if (p.grad_parts == nullptr) {
    engine.write(output, p.grad, keys.order, p.row_channels, p.row_channels);
  } else {
    float* to = p.grad_parts + int64_t(blockIdx.y) * keys.count * p.row_channels;
    engine.write(output, to, nullptr, p.row_channels, p.row_channels);
  }
}

constexpr int kBackwardFinishThreads = 64;

// The second stage of the backward, a thread for each element: adds the splits in order.
template <class Params>
__global__ void __launch_bounds__(kBackwardFinishThreads) infonce_bwd_finish_kernel(Params p) {
  const int64_t count = (p.keys.data == nullptr ? p.num_anchors : p.num_keys) * p.row_channels;
  const int64_t element = int64_t(blockIdx.x) * kBackwardFinishThreads + threadIdx.x;
  if (element >= count) return;
  float sum = 0.f;
  for (int64_t split = 0; split < p.splits; ++split) sum += p.grad_parts[split * count + element];
  const int64_t row = element / p.row_channels, channel = element % p.row_channels;
  p.grad[(p.keys.data == nullptr ? p.order[row] : row) * p.row_channels + channel] = sum;
}

}  // namespace pxc::cuda
