// The rows of both sides as the engine takes them: where they are in memory, and the planes that represent
// fp32 rows.
#pragma once

#include <type_traits>

#include "engine.cuh"
#include "infonce_numerics.cuh"

namespace pxc::cuda {

template <class Tile>
__device__ __forceinline__ Side anchors_of(const InfonceRows& p) {
  return {
      .rows = static_cast<const unsigned char*>(p.anchors.data),
      .labels = p.sorted_labels,
      .order = p.order,
      .count = int(p.num_anchors),
      .row_bytes = int(p.channels) * 2 * Tile::kPlanes,
  };
}

// Whether only the pairs that example mining keeps take part.
template <class Params>
constexpr bool kMined = std::is_base_of_v<MinedRange, Params>;

// The keys; `p.keys` is null where the anchors are the keys.
template <class Tile, class Params>
__device__ __forceinline__ Side keys_of(const Params& p) {
  if (p.keys.data == nullptr) return anchors_of<Tile>(p);
  return {
      .rows = static_cast<const unsigned char*>(p.keys.data),
      .labels = p.key_labels,
      .order = nullptr,
      .count = int(p.num_keys),
      .row_bytes = int(p.channels) * 2 * Tile::kPlanes,
  };
}

// --- planes of fp32 rows ---

// Planes are fp16 numbers: rows times a power of two that all rows of a side share. It is 2^8 for a side
// whose largest number is in [2^-8, 2^7), as it is for rows of length 1; otherwise it takes the largest
// number to [2^14, 2^15). Numbers below 2^-25 in these units are lost.
constexpr int kUsualExponent = 8, kSmallestUsual = -8, kPlaneThreads = 256, kPlaneChannels = 8;

// The exponent of that power of two, for a side whose largest number is `peak`.
__device__ __forceinline__ int plane_exponent(float peak) {
  const int exponent = int(float_bits(peak) >> 23) - 127;
  if (peak == 0.f || (exponent >= kSmallestUsual && exponent < kHalfExponent - kUsualExponent)) {
    return kUsualExponent;
  }
  return min(kHalfExponent - 1 - exponent, 126);
}

// The factors that undo the scaling of either side's planes.
__device__ __forceinline__ float unscale_of_anchors(const InfonceRows& p) {
  return p.anchor_unscale == nullptr ? 1.f : *p.anchor_unscale;
}
template <class Params>
__device__ __forceinline__ float unscale_of_keys(const Params& p) {
  if (p.keys.data == nullptr) return unscale_of_anchors(p);
  return p.key_unscale == nullptr ? 1.f : *p.key_unscale;
}

// Likewise of the negatives', which are the keys unless mining has drawn them.
__device__ __forceinline__ float unscale_of_negatives(const InfonceForwardParams& p) {
  return unscale_of_keys(p);
}
__device__ __forceinline__ float unscale_of_negatives(const MinedForwardParams& p) {
  if (p.negatives.data == nullptr) return unscale_of_keys(p);
  return p.negative_unscale == nullptr ? 1.f : *p.negative_unscale;
}

// A cosine in the units of scores, which sums of planes are: powers of two apart, so exact within fp32's
// range.
template <class Params>
__device__ __forceinline__ float as_score(const Params& p, float cosine) {
  return p.anchor_unscale == nullptr ? cosine : cosine / *p.anchor_unscale / unscale_of_keys(p);
}

// A warp per row: of the anchors in blocks with y 0, of the keys in those with y 1, or in all if `only_keys`.
// The first launch takes the usual power of two, and leaves each block's largest finite number; the second
// redoes the sides that this power does not fit. Rows without a label are nobody's to read, so they get no
// planes.
template <int kPlanes, class Params>
__global__ void __launch_bounds__(kPlaneThreads) infonce_planes_kernel(Params p, bool only_keys, bool again) {
  constexpr int kWarps = kPlaneThreads / kWarp;
  SharedMemory memory;
  float* warps = memory.take<float>(kWarps);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const bool of_keys = only_keys || blockIdx.y == 1;
  const float* rows = static_cast<const float*>((of_keys ? p.keys : p.anchors).data);
  const int32_t* labels = of_keys ? p.key_labels : p.anchor_labels;
  Half* planes = reinterpret_cast<Half*>(of_keys ? p.key_planes : p.anchor_planes);
  const int64_t count = of_keys ? p.num_keys : p.num_anchors;
  float* peaks = p.peaks + int64_t(blockIdx.y) * gridDim.x;

  int exponent = kUsualExponent;
  float peak = 0.f;
  if (again) {
    for (int block = int(threadIdx.x); block < int(gridDim.x); block += kPlaneThreads) {
      peak = fmaxf(peak, peaks[block]);
    }
    exponent = plane_exponent(block_max<kPlaneThreads>(peak, warps));
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *(of_keys ? p.key_unscale : p.anchor_unscale) = power_of_two(-exponent);
    }
    if (exponent == kUsualExponent) return;
  }
  const float scale = power_of_two(exponent);
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < count; row += int64_t(gridDim.x) * kWarps) {
    if (labels[row] < 0) continue;
    const float* from = rows + row * p.row_channels;
    Half* to = planes + row * kPlanes * p.channels;
    for (int64_t first = lane * kPlaneChannels; first < p.channels; first += kWarp * kPlaneChannels) {
      float values[kPlaneChannels];
      if (p.row_channels % 4 == 0 && reinterpret_cast<uint64_t>(rows) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kPlaneChannels; i += 4) {
          const float4 four = first + i < p.row_channels ? *reinterpret_cast<const float4*>(from + first + i)
                                                         : make_float4(0.f, 0.f, 0.f, 0.f);
          values[i] = four.x;
          values[i + 1] = four.y;
          values[i + 2] = four.z;
          values[i + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPlaneChannels; ++i) {
          values[i] = first + i < p.row_channels ? from[first + i] : 0.f;
        }
      }
      uint32_t words[kPlanes][kPlaneChannels / 2];
#pragma unroll
      for (int i = 0; i < kPlaneChannels; i += 2) {
        float low = values[i], high = values[i + 1];
        if (fabsf(low) < INFINITY) peak = fmaxf(peak, fabsf(low));
        if (fabsf(high) < INFINITY) peak = fmaxf(peak, fabsf(high));
        low *= scale;
        high *= scale;
        words[0][i / 2] = pack<Half>(low, high);
        if constexpr (kPlanes == 2) {  // an infinity or NaN leaves no remainder
          low -= to_float(from_float<Half>(low));
          high -= to_float(from_float<Half>(high));
          words[1][i / 2] =
              pack<Half>(fabsf(low) < INFINITY ? low : 0.f, fabsf(high) < INFINITY ? high : 0.f);
        }
      }
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        *reinterpret_cast<uint4*>(to + plane * p.channels + first) =
            make_uint4(words[plane][0], words[plane][1], words[plane][2], words[plane][3]);
      }
    }
  }
  if (again) return;
  peak = block_max<kPlaneThreads>(peak, warps);
  if (threadIdx.x == 0) peaks[blockIdx.x] = peak;
}

}  // namespace pxc::cuda
