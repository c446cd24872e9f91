// What Python hands to a kernel: one plain struct per call, filled field by field (seam.h).
//
// A struct that both sides share is named like the record of backends/calls.py which holds it in Python; the
// structs of either side, ...Params, add what is its own. Every pointer is memory that torch owns and that
// outlives the call; sizes and strides count elements. No struct mentions torch, so one build of the module
// serves any torch.
#pragma once

#include <cstdint>

#include "fields.h"

namespace pxc {

// The first three are what rows and maps come in.
enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64 };

struct Float16;  // what a pointer to fp16 numbers points to; each side has a type of its own to compute with

// Rows whose type is known when the kernel runs. All of a struct are of one type.
template <class Void>
struct Array {
  Void* data;
  DType dtype;
};
using Rows = Array<void>;
using ConstRows = Array<const void>;

// A [B, D, H, W] tensor of any strides; `pixel` below always means h * W + w.
struct EmbeddingMap {
  const void* map;
  DType map_dtype;
  int64_t batch, channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;

  template <class Visit>
  void each_field(Visit& visit) {
    visit("embeddings", *this);  // one tensor
  }
};

// Its gradient, dense: of the same type and sizes, with strides of its own.
struct GradientMap {
  void* grad_map;  // out
  int64_t grad_stride_batch, grad_stride_channel, grad_stride_row, grad_stride_column;

  template <class Visit>
  void each_field(Visit& visit) {
    visit("grad_embeddings", *this);
  }
};

struct Sampling {
  const int64_t* labels;       // [B, pixels]
  const int64_t* predictions;  // [B, pixels]
  const int32_t* priority;     // [B, pixels]
  int64_t batch, pixels, num_classes;
  int64_t max_samples, max_views, min_pixels, ignore_index;
  int64_t hard_share;      // of what a pair gives, in units of 2^-24; at most 2^24
  int64_t* indices;        // [max_samples] out, flat over B * pixels, 0 in padding rows
  int32_t* anchor_labels;  // [max_samples] out, -1 in padding rows
  int32_t* count;          // [] out, rows that are not padding
  PXC_FIELDS((), labels, predictions, priority, batch, pixels, num_classes, max_samples, max_views,
             min_pixels, ignore_index, hard_share, indices, anchor_labels, count)
};

struct Gather : EmbeddingMap {
  const int64_t* indices;  // [rows], flat over B * H * W
  int64_t num_rows;
  int32_t normalize;
  Rows rows;        // [rows, D] out
  float* inv_norm;  // [rows] out, 0 where the norm is
  PXC_FIELDS((EmbeddingMap), indices, num_rows, normalize, rows, inv_norm)
};

struct GatherBackward : EmbeddingMap, GradientMap {
  ConstRows grad_rows;     // [rows, D]
  const int64_t* indices;  // [rows]
  const float* inv_norm;   // [rows], from the forward
  int64_t num_rows;
  int32_t normalize;
  PXC_FIELDS((EmbeddingMap, GradientMap), grad_rows, indices, inv_norm, num_rows, normalize)
};

struct Collect : EmbeddingMap {
  const int64_t* labels;    // [B, pixels]
  const int32_t* priority;  // [B, pixels]
  int64_t num_classes, pixels_per_image, ignore_index;
  int32_t normalize;
  Rows rows;            // [B, num_classes, 1 + pixels_per_image, D] out, the region first
  int32_t* row_labels;  // [B, num_classes, 1 + pixels_per_image] out, -1 for nothing to store
  PXC_FIELDS((EmbeddingMap), labels, priority, num_classes, pixels_per_image, ignore_index, normalize, rows,
             row_labels)
};

struct Write {                // which moves bytes: its rows are of one type, and it need not know which
  const void* rows;           // [B, num_classes, 1 + pixels_per_image, D], dtype of the bank
  const int32_t* row_labels;  // [B, num_classes, 1 + pixels_per_image]
  int64_t batch, num_classes, pixels_per_image;
  int64_t row_bytes;  // D elements
  int64_t region_slots, pixel_slots;
  void* keys;           // [num_classes, region_slots + pixel_slots, D] in and out
  int32_t* key_labels;  // [num_classes, region_slots + pixel_slots] in and out
  int64_t *region_ptr, *region_fill, *pixel_ptr, *pixel_fill;  // [num_classes] in and out
  PXC_FIELDS((), rows, row_labels, batch, num_classes, pixels_per_image, row_bytes, region_slots, pixel_slots,
             keys, key_labels, region_ptr, region_fill, pixel_ptr, pixel_fill)
};

// Dot products are counted in equal bins over [-1, 1]; those outside belong to the first and the last.
constexpr int kScoreBins = 512;

// --- CPU ---

namespace cpu {

struct SamplingParams : Sampling {
  uint64_t* pool_keys;  // [B, pixels] scratch
  int32_t threads;
  PXC_FIELDS((Sampling), pool_keys, threads)
};

struct GatherParams : Gather {
  float* wide;  // [rows, D] scratch
  int32_t threads;
  PXC_FIELDS((Gather), wide, threads)
};

struct GatherBackwardParams : GatherBackward {
  float* wide;  // [rows, D] scratch
  int32_t threads;
  PXC_FIELDS((GatherBackward), wide, threads)
};

struct CollectParams : Collect {
  uint64_t* pool_keys;  // [B, pixels] scratch
  float* weights;       // [B * pixels + kLanes - 1] scratch: groups of kLanes may end past the last pixel
  double* sums;         // [B, num_classes, D] scratch
  float* wide;          // [B, num_classes, pixels_per_image, D] scratch
  int32_t threads;
  PXC_FIELDS((Collect), pool_keys, weights, sums, wide, threads)
};

struct WriteParams : Write {
  int32_t threads;
  PXC_FIELDS((Write), threads)
};

// InfoNCE on the CPU is a loop over tiles. With AVX2 and AVX-512 most of it makes its own products
// (ContrastRows); elsewhere, and in the backward of keys, they are torch's, and these are the steps between
// them. `scale` is log2(e) / temperature throughout: log-sum-exps are in units of log2.

struct WidenParams {
  ConstRows source;        // [?, D]
  const int64_t* indices;  // [rows] or null for the first rows
  int64_t num_rows, channels;
  float* rows;  // [rows, D] out
  int32_t threads;
  PXC_FIELDS((), source, indices, num_rows, channels, rows, threads)
};

struct TilesParams {
  const int32_t* key_labels;  // [K]
  int64_t num_keys;
  int64_t max_keys;  // of a tile
  int64_t* tiles;    // [capacity, 3] out: first key, number of keys, their label or -1 if they differ
  int64_t capacity;
  int64_t* num_tiles;  // [] out
  PXC_FIELDS((), key_labels, num_keys, max_keys, tiles, capacity, num_tiles)
};

struct CollectKeysParams {
  const int32_t* key_labels;  // [K]
  int64_t num_keys, max_keys;
  int32_t label;
  int64_t* cursor;   // [] in and out: where to go on looking
  int64_t* indices;  // [max_keys] out: the next keys of that label, ascending
  int64_t* found;    // [] out
  PXC_FIELDS((), key_labels, num_keys, max_keys, label, cursor, indices, found)
};

struct NegativesParams {
  float* scores;  // [rows, keys] in: dot products; out: exp2((dot product - shift) * scale), 0 for positives
  int64_t num_rows, num_keys;
  const int32_t* anchor_labels;  // [rows]
  const int32_t* key_labels;     // [keys], or null if every key is a negative of every row
  const float* neg_min;          // [rows], dot products below it take no part; or null
  float scale;
  float* shift;   // [rows] in and out: running shift, a dot product
  float* sum;     // [rows] in and out: sum of exp2((dot product - shift) * scale)
  float* output;  // [rows, D] in and out: rescaled when the shift moves; null without gradient
  int64_t channels;
  int32_t threads;
  PXC_FIELDS((), scores, num_rows, num_keys, anchor_labels, key_labels, neg_min, scale, shift, sum, output,
             channels, threads)
};

struct PositivesParams {
  float* scores;  // [rows, keys] in: dot products; out: sigma of eq. (4), 0 for the pair (i, i)
  int64_t num_rows, num_keys;
  const float* shift;           // [rows], of pass 1
  const float* sum_log2;        // [rows], the logarithm of its sum
  const int64_t* anchor_index;  // [rows], or null without exclude_self
  const int64_t* key_index;     // [keys], or null without exclude_self
  const float* pos_max;         // [rows], dot products from it on take no part; or null
  float scale;
  double* loss_sum;        // [rows] in and out: sum of eq. (2)
  double* pos_weight_sum;  // [rows] in and out: S of eq. (4)
  int64_t* pos_counts;     // [rows] in and out
  int32_t threads;
  PXC_FIELDS((), scores, num_rows, num_keys, shift, sum_log2, anchor_index, key_index, pos_max, scale,
             loss_sum, pos_weight_sum, pos_counts, threads)
};

struct CountScoresParams {
  const float* scores;  // [rows, keys] dot products
  int64_t num_rows, num_keys;
  const int32_t* anchor_labels;  // [rows]
  const int32_t* key_labels;     // [keys]: those of the row's own label do not count; or null
  const int64_t* anchor_index;   // [rows], or null without exclude_self
  const int64_t* key_index;      // [keys], or null without exclude_self
  int32_t* counts;               // [rows, kScoreBins] in and out
  int32_t threads;
  PXC_FIELDS((), scores, num_rows, num_keys, anchor_labels, key_labels, anchor_index, key_index, counts,
             threads)
};

// A contrast of which the fused kernels make the products as well: the whole call, in the caller's order.
// They allocate what they need themselves.
struct ContrastRows {
  ConstRows anchors;             // [A, D]
  const int32_t* anchor_labels;  // [A]
  int64_t num_anchors, channels;
  ConstRows keys;             // [K, D]
  const int32_t* key_labels;  // [K]
  int64_t num_keys;
  ConstRows negatives;             // [M, D], which may be the keys
  const int32_t* negative_labels;  // [M]
  int64_t num_negatives;
  int32_t exclude_self;
  int32_t threads;
  PXC_FIELDS((), anchors, anchor_labels, num_anchors, channels, keys, key_labels, num_keys, negatives,
             negative_labels, num_negatives, exclude_self, threads)
};

struct ContrastForwardParams : ContrastRows {
  const float* neg_min;  // [A], dot products with negatives below it take no part; or null
  const float* pos_max;  // [A], dot products with positives from it on take no part; or null
  double temperature;
  float* loss;         // [A] out, eq. (3)
  float* neg_lse;      // [A] out, eq. (1)
  float* pos_weight;   // [A] out, eq. (4)
  int32_t* pos_count;  // [A] out
  float* anchor_grad;  // [A, D] out, eq. (6) without the upstream gradient; null without gradient
  PXC_FIELDS((ContrastRows), neg_min, pos_max, temperature, loss, neg_lse, pos_weight, pos_count, anchor_grad)
};

struct ContrastCountsParams : ContrastRows {
  int32_t* neg_counts;  // [A, kScoreBins] out
  int32_t* pos_counts;  // [A, kScoreBins] out
  PXC_FIELDS((ContrastRows), neg_counts, pos_counts)
};

// Of anchors with each other.
struct ContrastBackwardParams {
  ConstRows anchors;             // [A, D]
  const int32_t* anchor_labels;  // [A]
  int64_t num_anchors, channels;
  int32_t exclude_self;
  double temperature;
  const float* neg_lse;     // [A], from the forward
  const float* pos_weight;  // [A]
  const float* grad_scale;  // [A], g / |P|
  const float* neg_min;     // [A] or null, as in the forward
  const float* pos_max;     // [A] or null
  float* grad;              // [A, D] out
  int32_t threads;
  PXC_FIELDS((), anchors, anchor_labels, num_anchors, channels, exclude_self, temperature, neg_lse,
             pos_weight, grad_scale, neg_min, pos_max, grad, threads)
};

struct FinishParams {
  int64_t num_rows, channels;
  const int64_t* anchor_index;   // [rows], where row i goes in the outputs
  const float* shift;            // [rows], dot products
  const float* sum;              // [rows]
  const float* weight_sum;       // [rows] of the weights that O is made of: sum, unless they were rounded
  const float* negatives;        // [rows, D] O of pass 1, not yet divided by sum; null without gradient
  const float* positives;        // [rows, D] G of pass 2; null without gradient
  const double* loss_sum;        // [rows]
  const double* pos_weight_sum;  // [rows]
  const int64_t* pos_counts;     // [rows]
  float scale;
  float temperature;
  float* loss;         // [A] out, eq. (3)
  float* neg_lse;      // [A] out, eq. (1)
  float* pos_weight;   // [A] out, eq. (4)
  int32_t* pos_count;  // [A] out
  float* anchor_grad;  // [A, D] out, eq. (6) without the upstream gradient; null without gradient
  int32_t threads;
  PXC_FIELDS((), num_rows, channels, anchor_index, shift, sum, weight_sum, negatives, positives, loss_sum,
             pos_weight_sum, pos_counts, scale, temperature, loss, neg_lse, pos_weight, pos_count,
             anchor_grad, threads)
};

struct ScoreGradientParams {
  float* scores;  // [rows, anchors] in: dot products; out: ds of eq. (5), summed with its mirror if symmetric
  int64_t num_rows, num_anchors;
  const int32_t* row_labels;      // [rows], -1: the whole row is 0
  const int32_t* anchor_labels;   // [anchors], all >= 0
  const int64_t* row_index;       // [rows], or null without exclude_self
  const int64_t* anchor_index;    // [anchors], or null without exclude_self
  const float* neg_lse_log2;      // [anchors], +inf where there is no negative
  const float* push;              // [anchors], of the negatives: g S / (|P| temperature)
  const float* pull;              // [anchors], of the positives: g / (|P| temperature)
  const float* row_neg_lse_log2;  // [rows], likewise, when the rows are anchors too (symmetric); else null
  const float* row_push;          // [rows]
  const float* row_pull;          // [rows]
  const float* neg_min;           // [anchors], dot products with negatives below it take no part; or null
  const float* pos_max;           // [anchors], dot products with positives from it on take no part; or null
  const float* row_neg_min;       // [rows], likewise, when the rows are anchors too
  const float* row_pos_max;       // [rows]
  float scale;
  int32_t threads;
  PXC_FIELDS((), scores, num_rows, num_anchors, row_labels, anchor_labels, row_index, anchor_index,
             neg_lse_log2, push, pull, row_neg_lse_log2, row_push, row_pull, neg_min, pos_max, row_neg_min,
             row_pos_max, scale, threads)
};

}  // namespace cpu

// --- CUDA: in device memory, on the caller's stream ---

// The part that every call begins with.
struct Launch {
  int32_t device;   // its index
  uint64_t stream;  // cudaStream_t
  PXC_FIELDS((), device, stream)
};

namespace cuda {

// Keys that a block sorts: 10 bits number them. Of pixels they are a chunk.
constexpr int kTileBits = 10, kTileKeys = 1 << kTileBits, kSortThreads = kTileKeys / 2;

// A key of a pixel is its place in the chunk, its priority above, and (class, hard or easy) in the bits from
// here on; all ones are neither.
constexpr int kPoolShift = kTileBits + 32;
constexpr int64_t kMaxClasses = (int64_t(1) << (64 - kPoolShift - 1)) - 1;
constexpr int64_t kMaxChannels = 512;  // of a row that InfoNCE takes

struct SamplingParams : Launch, Sampling {
  uint64_t* pool_keys;   // [B, chunks, kTileKeys] scratch
  int32_t* pool_starts;  // [B, chunks, 2 num_classes + 1] scratch
  uint64_t* pair_keys;   // [num_classes, B] scratch
  int32_t* pool_keep;    // [num_classes, B, 2] scratch: rows that the hard and the easy pool give
  int32_t* pool_rows;    // [num_classes, B, 2] scratch: the first of them
  PXC_FIELDS((Launch, Sampling), pool_keys, pool_starts, pair_keys, pool_keep, pool_rows)
};

struct GatherParams : Launch, Gather {  // a row of an index outside the map is 0
  PXC_FIELDS((Launch, Gather))
};

struct GatherBackwardParams : Launch, GatherBackward {
  float* wide;             // [rows, D] scratch: gradients of the pixels
  int64_t* row_pixels;     // [rows] scratch: their indices, -1 for a row without gradient
  uint64_t* sort_keys;     // [tiles, kTileKeys] scratch; null if there are no more rows than that
  int64_t* sorted_pixels;  // [rows] scratch: the same in order
  int64_t* sorted_rows;    // [rows] scratch: whose they are
  PXC_FIELDS((Launch, GatherBackward), wide, row_pixels, sort_keys, sorted_pixels, sorted_rows)
};

struct CollectParams : Launch, Collect {
  uint64_t* pool_keys;     // [B, chunks, kTileKeys] scratch
  int32_t* pool_starts;    // [B, chunks, num_classes + 1] scratch
  float* chunk_sums;       // [B, chunks, num_classes, D] scratch, of classes that the chunk has
  double* sums;            // [B, num_classes, D] scratch
  int64_t* chosen_pixels;  // [B, num_classes, pixels_per_image] scratch
  PXC_FIELDS((Launch, Collect), pool_keys, pool_starts, chunk_sums, sums, chosen_pixels)
};

struct WriteParams : Launch, Write {
  PXC_FIELDS((Launch, Write))
};

// InfoNCE takes fp32 rows as they lie, and 16-bit ones of 16-byte units, 16-byte aligned, or of 4-byte units,
// 4-byte aligned: Python pads others with zero channels. Anchors are visited in the order of their class;
// [splits, ...] are the partial results of that many shares of the walk.

struct InfonceRows {
  int32_t full_float32;  // of fp32 rows, two planes are multiplied and fp32's accuracy kept; else one
  int64_t row_channels;  // D, of a row as the caller has it
  int64_t channels;      // of a row or plane as it is multiplied, padding included
  float temperature;
  int32_t exclude_self;
  int64_t splits;
  ConstRows anchors;             // [A, channels], of fp32 rows [A, D]
  const int32_t* anchor_labels;  // [A]
  int64_t num_anchors;
  int32_t* order;          // [A] scratch: anchors by (label, index), those without a label last
  int32_t* sorted_labels;  // [A] scratch
  uint64_t* sort_keys;     // [tiles, kTileKeys] scratch; null if there are no more anchors than that
  float* score_scale;      // [] scratch: times which products become scores in units of log2
  Float16* anchor_planes;  // of fp32 rows [A, planes, channels] scratch; else null
  float* peaks;            // likewise [2, plane_blocks] scratch
  int64_t plane_blocks;    // of either side
  float* anchor_unscale;   // likewise [] scratch: anchors are their planes' sum times this
  PXC_FIELDS((), full_float32, row_channels, channels, temperature, exclude_self, splits, anchors,
             anchor_labels, num_anchors, order, sorted_labels, sort_keys, score_scale, anchor_planes, peaks,
             plane_blocks, anchor_unscale)
};

struct InfonceForwardParams : Launch, InfonceRows {
  ConstRows keys;       // as the anchors [K, channels], or null: the anchors are the keys, in their order
  Float16* key_planes;  // as the anchors'
  float* key_unscale;   // likewise
  const int32_t* key_labels;  // [K], or null
  int64_t num_keys;
  int32_t* label_ranges;     // [pieces of keys, 2] scratch: smallest and largest label
  float* shift_parts;        // [splits, A] scratch
  float* sum_parts;          // [splits, A] scratch: of exp2(score - shift)
  float* negative_parts;     // [splits, A, part_channels] scratch: O of pass 1; null without gradient
  int64_t fewest_splits;     // of the walk of a tile in pass 2, whose number the device chooses
  int64_t positive_blocks;   // of pass 2
  int32_t* positive_splits;  // [] scratch: how many there are
  float* loss_parts;         // [splits, A] scratch: sum of eq. (2)
  float* pos_weight_parts;   // [splits, A] scratch: of sigma
  int32_t* pos_count_parts;  // [splits, A] scratch
  float* positive_parts;     // [splits, A, part_channels] scratch: G of pass 2; null without gradient
  int64_t part_channels;     // channels, up to a multiple of 64
  float* loss;               // [A] out, eq. (3)
  float* neg_lse;            // [A] out, eq. (1)
  float* pos_weight;         // [A] out, eq. (4)
  int32_t* pos_count;        // [A] out
  float* anchor_grad;        // [A, D] out, eq. (6) for g = 1; null without gradient
  PXC_FIELDS((Launch, InfonceRows), keys, key_planes, key_unscale, key_labels, num_keys, label_ranges,
             shift_parts, sum_parts, negative_parts, fewest_splits, positive_blocks, positive_splits,
             loss_parts, pos_weight_parts, pos_count_parts, positive_parts, part_channels, loss, neg_lse,
             pos_weight, pos_count, anchor_grad)
};

struct InfonceBackwardParams : Launch, InfonceRows {
  ConstRows keys;             // as the anchors, or null: the symmetric backward of anchors that are the keys
  Float16* key_planes;        // as the anchors'
  float* key_unscale;         // likewise
  const int32_t* key_labels;  // [K], or null
  int64_t num_keys;
  const float* neg_lse;     // [A], from the forward, as is
  const float* pos_weight;  // [A]
  const float* grad_scale;  // [A], g / |P|
  float* weight_peaks;      // [A / kSortThreads] scratch: fp16 weights are scaled by the largest; or null
  float* factors;           // [A, 4] scratch: neg_lse_log2, push g S / |P|, pull g / |P|, the label
  int32_t* label_ranges;    // [anchor tiles, 2] scratch: smallest and largest label
  float* grad_parts;        // [splits, K, D] scratch; null with one split
  float* grad;              // [K, D] out, of the keys; of the anchors if they are the keys
  PXC_FIELDS((Launch, InfonceRows), keys, key_planes, key_unscale, key_labels, num_keys, neg_lse, pos_weight,
             grad_scale, weight_peaks, factors, label_ranges, grad_parts, grad)
};

// --- example mining ---

// The products that take part: of negatives from neg_min on, of positives below pos_max. NaN always does.
struct MinedRange {
  const float* neg_min;  // [A]
  const float* pos_max;  // [A]
  PXC_FIELDS((), neg_min, pos_max)
};

// The negatives, if they are other rows than the keys: they take the keys' place in pass 1, and what
// InfonceRows has of keys they have of their own.
struct NegativeRows {
  ConstRows negatives;             // as the keys [M, channels]; null: the keys
  Float16* negative_planes;        // as the keys'
  const int32_t* negative_labels;  // [M]
  int64_t num_negatives;
  int32_t* negative_ranges;  // [pieces of negatives, 2] scratch
  float* negative_scale;     // [] scratch
  float* negative_unscale;   // [] scratch
  PXC_FIELDS((), negatives, negative_planes, negative_labels, num_negatives, negative_ranges, negative_scale,
             negative_unscale)
};

struct MinedForwardParams : InfonceForwardParams, NegativeRows, MinedRange {
  PXC_FIELDS((InfonceForwardParams, NegativeRows, MinedRange))
};

struct MinedBackwardParams : InfonceBackwardParams, MinedRange {
  float* bounds;  // [A, 2] scratch: both, in the order of visits and in units of scores
  PXC_FIELDS((InfonceBackwardParams, MinedRange), bounds)
};

struct ScoreCountsParams : Launch, InfonceRows, NegativeRows {
  ConstRows keys;             // as the anchors, or null: the anchors are the keys
  Float16* key_planes;        // as the anchors'
  float* key_unscale;         // likewise
  const int32_t* key_labels;  // [K], or null
  int64_t num_keys;
  int32_t* label_ranges;    // [pieces of keys, 2] scratch
  int64_t positive_splits;  // of the walk over the keys; `splits` are those of the walk over the negatives
  int32_t* neg_counts;      // [A, kScoreBins] in (0) and out
  int32_t* pos_counts;      // [A, kScoreBins] in (0) and out
  PXC_FIELDS((Launch, InfonceRows, NegativeRows), keys, key_planes, key_unscale, key_labels, num_keys,
             label_ranges, positive_splits, neg_counts, pos_counts)
};

}  // namespace cuda
}  // namespace pxc
