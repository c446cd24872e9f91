// What Python hands to a kernel: one plain struct per call, filled field by field in bindings.cpp.
// Every pointer is memory that torch owns and that outlives the call; sizes and strides count elements.
// No struct mentions torch, so one build of the module serves any torch.
#pragma once

#include <cstdint>

namespace pxc {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A [B, D, H, W] tensor of any strides; `pixel` below always means h * W + w.
struct EmbeddingMap {
  const void* map;
  int32_t map_dtype;  // DType
  int64_t batch, channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;
};

struct SamplingParams {
  const int64_t* labels;       // [B, pixels]
  const int64_t* predictions;  // [B, pixels]
  const int32_t* priority;     // [B, pixels]
  int64_t batch, pixels, num_classes;
  int64_t max_samples, max_views, min_pixels, ignore_index;
  uint64_t* pool_keys;     // [B, pixels] scratch
  int64_t* indices;        // [max_samples] out, flat over B * pixels, 0 in padding rows
  int32_t* anchor_labels;  // [max_samples] out, -1 in padding rows
  int32_t* count;          // [] out, rows that are not padding
  int32_t threads;
};

struct GatherParams : EmbeddingMap {
  const int64_t* indices;  // [rows], flat over B * H * W
  int64_t num_rows;
  int32_t normalize;
  float* wide;         // [rows, D] scratch
  int32_t rows_dtype;  // DType
  void* rows;          // [rows, D] out
  float* inv_norm;     // [rows] out, 0 where the norm is
  int32_t threads;
};

struct GatherBackwardParams : EmbeddingMap {
  const int64_t* indices;  // [rows]
  int64_t num_rows;
  int32_t normalize;
  int32_t rows_dtype;     // DType
  const void* grad_rows;  // [rows, D]
  const float* inv_norm;  // [rows], from the forward
  float* wide;            // [rows, D] scratch
  void* grad_map;         // [B, D, H, W] out, dense, map_dtype, with the four strides below
  int64_t grad_stride_batch, grad_stride_channel, grad_stride_row, grad_stride_column;
  int32_t threads;
};

struct CollectParams : EmbeddingMap {
  const int64_t* labels;    // [B, pixels]
  const int32_t* priority;  // [B, pixels]
  int64_t num_classes, pixels_per_image, ignore_index;
  int32_t normalize;
  uint64_t* pool_keys;  // [B, pixels] scratch
  float* weights;       // [B * pixels + 15] scratch: groups of 16 may end behind the last pixel
  double* sums;         // [B, num_classes, D] scratch
  float* wide;          // [B, num_classes, pixels_per_image, D] scratch
  int32_t rows_dtype;   // DType
  void* rows;           // [B, num_classes, 1 + pixels_per_image, D] out, the region first
  int32_t* row_labels;  // [B, num_classes, 1 + pixels_per_image] out, -1 for nothing to store
  int32_t threads;
};

struct WriteParams {
  const void* rows;           // [B, num_classes, 1 + pixels_per_image, D], dtype of the bank
  const int32_t* row_labels;  // [B, num_classes, 1 + pixels_per_image]
  int64_t batch, num_classes, pixels_per_image;
  int64_t row_bytes;  // D elements
  int64_t region_slots, pixel_slots;
  void* keys;           // [num_classes, region_slots + pixel_slots, D] in and out
  int32_t* key_labels;  // [num_classes, region_slots + pixel_slots] in and out
  int64_t *region_ptr, *region_fill, *pixel_ptr, *pixel_fill;  // [num_classes] in and out
  int32_t threads;
};

// InfoNCE on the CPU is a loop over tiles. With AVX-512 the forward makes its own products
// (FusedForwardParams); elsewhere, and in the backward, they are torch's, and these are the steps between
// them. `scale` is log2(e) / temperature throughout: shifts and log-sum-exps are in units of log2.

struct WidenParams {
  const void* source;      // [?, D]
  int32_t source_dtype;    // DType
  const int64_t* indices;  // [rows] or null for the first rows
  int64_t num_rows, channels;
  float* rows;  // [rows, D] out
  int32_t threads;
};

struct TilesParams {
  const int32_t* key_labels;  // [K]
  int64_t num_keys;
  int64_t max_keys;  // of a tile
  int64_t* tiles;    // [capacity, 3] out: first key, number of keys, their label or -1 if they differ
  int64_t capacity;
  int64_t* num_tiles;  // [] out
};

struct CollectKeysParams {
  const int32_t* key_labels;  // [K]
  int64_t num_keys, max_keys;
  int32_t label;
  int64_t* cursor;   // [] in and out: where to go on looking
  int64_t* indices;  // [max_keys] out: the next keys of that label, ascending
  int64_t* found;    // [] out
};

struct NegativesParams {
  float* scores;  // [rows, keys] in: dot products; out: exp2(score - shift), 0 for positives
  int64_t num_rows, num_keys;
  const int32_t* anchor_labels;  // [rows]
  const int32_t* key_labels;     // [keys], or null if every key is a negative of every row
  float scale;
  float* shift;   // [rows] in and out: running shift, log2 units
  float* sum;     // [rows] in and out: sum of exp2(score - shift)
  float* output;  // [rows, D] in and out: rescaled when the shift moves; null without gradient
  int64_t channels;
  int32_t threads;
};

struct PositivesParams {
  float* scores;  // [rows, keys] in: dot products; out: sigma of eq. (4), 0 for the pair (i, i)
  int64_t num_rows, num_keys;
  const float* neg_lse;         // [rows], log2 units
  const int64_t* anchor_index;  // [rows], or null without exclude_self
  const int64_t* key_index;     // [keys], or null without exclude_self
  float scale;
  double* loss_sum;        // [rows] in and out: sum of eq. (2)
  double* pos_weight_sum;  // [rows] in and out: S of eq. (4)
  int64_t* pos_counts;     // [rows] in and out
  int32_t threads;
};

// Both passes of the forward, with products of their own.
struct FusedForwardParams {
  const void* anchors;  // [rows, D] sorted by label, of fused_dtype(); D of bf16 padded with 0 to be even
  int64_t num_rows, channels;
  const int32_t* anchor_labels;  // [rows], ascending, all >= 0
  const int64_t* anchor_index;   // [rows], or null without exclude_self
  const void* keys;              // [K, D]
  int32_t keys_dtype;            // DType
  const int32_t* key_labels;     // [K]
  int64_t num_keys;
  const int64_t* tiles;  // [num_tiles, 3], from TilesParams with kFusedBlockK as max_keys
  int64_t num_tiles;
  float scale;
  void* panels;            // scratch: 4 kFusedBlockK rows of D, up to a multiple of 32, of the anchors' type
  float* shift;            // [rows] in (-inf) and out: running shift, log2 units
  float* sum;              // [rows] in (0) and out: of exp2(score - shift)
  float* weight_sum;       // [rows] in (0) and out: of the bf16 weights that O is made of; unused by fp32
  float* neg_lse;          // [rows] out, log2 units
  float* negatives;        // [rows, D] in (0) and out: O of pass 1, times sum; null without gradient
  float* positives;        // [rows, D] in (0) and out: G of pass 2; null without gradient
  double* loss_sum;        // [rows] in (0) and out: sum of eq. (2)
  double* pos_weight_sum;  // [rows] in (0) and out: S of eq. (4)
  int64_t* pos_counts;     // [rows] in (0) and out
  int32_t threads;
};

struct FinishParams {
  int64_t num_rows, channels;
  const int64_t* anchor_index;   // [rows], where row i goes in the outputs
  const float* shift;            // [rows], log2 units
  const float* sum;              // [rows]
  const float* weight_sum;       // [rows] of the weights that O is made of: sum, unless they were rounded
  const float* negatives;        // [rows, D] O of pass 1, not yet divided by sum; null without gradient
  const float* positives;        // [rows, D] G of pass 2; null without gradient
  const double* loss_sum;        // [rows]
  const double* pos_weight_sum;  // [rows]
  const int64_t* pos_counts;     // [rows]
  float temperature;
  float* loss;         // [A] out, eq. (3)
  float* neg_lse;      // [A] out, eq. (1), natural units
  float* pos_weight;   // [A] out, eq. (4)
  int32_t* pos_count;  // [A] out
  float* anchor_grad;  // [A, D] out, eq. (6) without the upstream gradient; null without gradient
  int32_t threads;
};

struct CoefficientsParams {
  float* scores;  // [rows, anchors] in: dot products; out: ds of eq. (5), summed with its mirror if symmetric
  int64_t num_rows, num_anchors;
  const int32_t* row_labels;     // [rows], -1: the whole row is 0
  const int32_t* anchor_labels;  // [anchors], all >= 0
  const int64_t* row_index;      // [rows], or null without exclude_self
  const int64_t* anchor_index;   // [anchors], or null without exclude_self
  const float* neg_lse;          // [anchors], log2 units, +inf where there is no negative
  const float* neg_scale;        // [anchors], g S / (|P| temperature)
  const float* pos_scale;        // [anchors], g / (|P| temperature)
  const float* row_neg_lse;      // [rows], likewise, when the rows are anchors too (symmetric); else null
  const float* row_neg_scale;    // [rows]
  const float* row_pos_scale;    // [rows]
  float scale;
  int32_t threads;
};

// --- CUDA: the same jobs in device memory, on the caller's stream ---

// The part that every CUDA call begins with.
struct Launch {
  int32_t device;   // its index
  uint64_t stream;  // cudaStream_t
};

namespace cuda {

struct SamplingParams : Launch {
  const int64_t* labels;       // [B, pixels]
  const int64_t* predictions;  // [B, pixels]
  const int32_t* priority;     // [B, pixels]
  int64_t batch, pixels, num_classes;
  int64_t max_samples, max_views, min_pixels, ignore_index;
  uint64_t* pool_keys;     // [B, chunks, 1024] scratch; a chunk is 1024 pixels
  int32_t* pool_starts;    // [B, chunks, 2 num_classes + 1] scratch
  uint64_t* pair_keys;     // [num_classes, B] scratch
  int32_t* pool_keep;      // [num_classes, B, 2] scratch: rows that the hard and the easy pool give
  int32_t* pool_rows;      // [num_classes, B, 2] scratch: the first of them
  int64_t* indices;        // [max_samples] out, flat over B * pixels, 0 in padding rows
  int32_t* anchor_labels;  // [max_samples] out, -1 in padding rows
  int32_t* count;          // [] out, rows that are not padding
};

struct GatherParams : Launch, EmbeddingMap {
  const int64_t* indices;  // [rows], flat over B * H * W; a row of one outside is 0
  int64_t num_rows;
  int32_t normalize;
  int32_t rows_dtype;  // DType
  void* rows;          // [rows, D] out
  float* inv_norm;     // [rows] out, 0 where the norm is
};

struct GatherBackwardParams : Launch, EmbeddingMap {
  const int64_t* indices;  // [rows]
  int64_t num_rows;
  int32_t normalize;
  int32_t rows_dtype;      // DType
  const void* grad_rows;   // [rows, D]
  const float* inv_norm;   // [rows], from the forward
  float* wide;             // [rows, D] scratch: gradients of the pixels
  int64_t* row_pixels;     // [rows] scratch: their indices, -1 for a row without gradient
  uint64_t* sort_keys;     // [tiles, 1024] scratch; null if there are no more rows than that
  int64_t* sorted_pixels;  // [rows] scratch: the same in order
  int64_t* sorted_rows;    // [rows] scratch: whose they are
  void* grad_map;          // [B, D, H, W] out, dense, map_dtype, with the four strides below
  int64_t grad_stride_batch, grad_stride_channel, grad_stride_row, grad_stride_column;
};

struct CollectParams : Launch, EmbeddingMap {
  const int64_t* labels;    // [B, pixels]
  const int32_t* priority;  // [B, pixels]
  int64_t num_classes, pixels_per_image, ignore_index;
  int32_t normalize;
  uint64_t* pool_keys;     // [B, chunks, 1024] scratch; a chunk is 1024 pixels
  int32_t* pool_starts;    // [B, chunks, num_classes + 1] scratch
  float* chunk_sums;       // [B, chunks, num_classes, D] scratch, of classes that the chunk has
  double* sums;            // [B, num_classes, D] scratch
  int64_t* chosen_pixels;  // [B, num_classes, pixels_per_image] scratch
  int32_t rows_dtype;      // DType
  void* rows;              // [B, num_classes, 1 + pixels_per_image, D] out, the region first
  int32_t* row_labels;     // [B, num_classes, 1 + pixels_per_image] out, -1 for nothing to store
};

struct WriteParams : Launch {
  const void* rows;           // [B, num_classes, 1 + pixels_per_image, D], dtype of the bank
  const int32_t* row_labels;  // [B, num_classes, 1 + pixels_per_image]
  int64_t batch, num_classes, pixels_per_image;
  int64_t row_bytes;  // D elements
  int64_t region_slots, pixel_slots;
  void* keys;           // [num_classes, region_slots + pixel_slots, D] in and out
  int32_t* key_labels;  // [num_classes, region_slots + pixel_slots] in and out
  int64_t *region_ptr, *region_fill, *pixel_ptr, *pixel_fill;  // [num_classes] in and out
};

// InfoNCE takes fp32 rows as they lie, and 16-bit ones of 16-byte units, 16-byte aligned, or of 4-byte units,
// 4-byte aligned: Python pads others with zero channels. Anchors are visited in the order of their class;
// [splits, ...] are the partial results of that many shares of the walk.

struct InfonceRows {
  int32_t rows_dtype;    // DType
  int32_t full_float32;  // of fp32 rows, two planes are multiplied and fp32's accuracy kept; else one
  int64_t channels;      // of a row or plane as it is multiplied, padding included
  float temperature;
  int32_t exclude_self;
  int64_t splits;
  const void* anchors;           // [A, channels], of fp32 rows [A, D]
  const int32_t* anchor_labels;  // [A]
  int64_t num_anchors;
  int32_t* order;          // [A] scratch: anchors by (label, index), those without a label last
  int32_t* sorted_labels;  // [A] scratch
  uint64_t* sort_keys;     // [tiles, 1024] scratch; null if there are no more anchors than that
  float* score_scale;      // [] scratch: times which products become scores in units of log2
  void* anchor_planes;     // of fp32 rows [A, planes, channels] scratch, fp16; else null
  float* peaks;            // likewise [2, plane_blocks] scratch
  int64_t plane_blocks;    // of either side
  float* unscale;          // likewise [2] scratch: anchors, and keys, are their planes' sum times this
};

struct InfonceForwardParams : Launch, InfonceRows {
  const void* keys;  // as the anchors [K, channels], or null: the anchors are the keys, in their order
  void* key_planes;  // as the anchors'
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
  float* neg_lse;            // [A] out, eq. (1), natural units
  float* pos_weight;         // [A] out, eq. (4)
  int32_t* pos_count;        // [A] out
  float* anchor_grad;        // [A, grad_channels] out, eq. (6) for g = 1; null without gradient
  int64_t grad_channels;     // D
};

struct InfonceBackwardParams : Launch, InfonceRows {
  const void* keys;           // as the anchors, or null: the symmetric backward of anchors that are the keys
  void* key_planes;           // as the anchors'
  const int32_t* key_labels;  // [K], or null
  int64_t num_keys;
  const float* neg_lse;     // [A], from the forward, as is
  const float* pos_weight;  // [A]
  const float* grad_scale;  // [A], g / |P|
  const float* peak;        // [] of the largest weight: fp16 ones are scaled by it; or null
  float* coefficients;    // [A, 4] scratch: neg_lse in log2 units, factors of negatives and positives, index
  int32_t* label_ranges;  // [anchor tiles, 2] scratch: smallest and largest label
  float* grad_parts;      // [splits, K, grad_channels] scratch; null with one split
  float* grad;            // [K, grad_channels] out, of the keys; of the anchors if they are the keys
  int64_t grad_channels;  // D
};

}  // namespace cuda
}  // namespace pxc
