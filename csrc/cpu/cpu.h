// The CPU kernels, as bindings.cpp sees them. They throw BadValue for errors that only the data can show.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace pxc::cpu {

// A bad value, and its position, which the caller reports to the user.
struct BadValue {
  int64_t position, value;
};

void sampling(const SamplingParams&);
void gather(const GatherParams&);
void gather_backward(const GatherBackwardParams&);
void collect(const CollectParams&);
void write(const WriteParams&);
void plan_tiles(const TilesParams&);
void collect_keys(const CollectKeysParams&);
void contrast_forward(const ContrastForwardParams&);
void contrast_counts(const ContrastCountsParams&);
void contrast_backward(const ContrastBackwardParams&);

// Keys per tile of the fused forward. Smaller tiles would read and write O more often. At D = 256 an fp32
// tile, packed for both products, is 1 MiB and streams through L2.
constexpr int64_t kFusedBlockK = 512;
constexpr int kPanel = 32;  // columns that the fused kernels multiply at a time

// Anchors on a side of a tile of their own scores. The fewer, the more threads find work; a tile is two
// panels wide, so that both of its orders stay in a core's first cache.
constexpr int64_t kSymmetricTile = 64;

// Those of kLanes consecutive pixels of an image that belong to one class.
constexpr int64_t kLanes = 16;
struct Group {
  int64_t label;
  int64_t first;
  uint32_t member[kLanes];  // all ones or zero: a select by `and` keeps a NaN out of the other classes
};

// What the fused kernels multiply: anchors of some block against keys. Pass 1 meets the negative keys, pass 2
// the keys.
struct FusedRows {
  ConstRows anchors;  // [rows, D] sorted by label, of fused_dtype(); D of bf16 padded with 0 to be even
  int64_t num_rows, channels;
  const int32_t* anchor_labels;  // [rows], ascending, all >= 0
  const int64_t* anchor_index;   // [rows], or null without exclude_self
  ConstRows keys;                // [K, D]
  const int32_t* key_labels;     // [K]
  const int64_t* tiles;          // [num_tiles, 3], from TilesParams with kFusedBlockK as max_keys
  int64_t num_tiles;
  ConstRows negative_keys;         // [M, D], which may be the keys
  const int32_t* negative_labels;  // [M]
  const int64_t* negative_tiles;   // [num_negative_tiles, 3]
  int64_t num_negative_tiles;
  void* panels;  // scratch [num_panels]: kFusedBlockK rows of D, up to a multiple of 32, of the anchors'
                 // type; with gradient twice that
  int64_t num_panels;  // at least 2
  int32_t threads;
};

// What both passes of a forward sum up of each anchor, sorted as these are.
struct ForwardSums {
  float scale;
  const float* neg_min;    // [rows], dot products with negatives below it take no part; or null
  const float* pos_max;    // [rows], dot products with positives from it on take no part; or null
  float* shift;            // [rows] in (-inf) and out: running shift, a dot product
  float* sum;              // [rows] in (0) and out: of exp2((dot product - shift) * scale)
  float* weight_sum;       // [rows] in (0) and out: of the bf16 weights that O is made of; unused by fp32
  float* sum_log2;         // [rows] out: the logarithm of sum
  float* negatives;        // [rows, D] in (0) and out: O of pass 1, times sum; null without gradient
  float* positives;        // [rows, D] in (0) and out: G of pass 2; null without gradient
  double* loss_sum;        // [rows] in (0) and out: sum of eq. (2)
  double* pos_weight_sum;  // [rows] in (0) and out: S of eq. (4)
  int64_t* pos_counts;     // [rows] in (0) and out
};

struct FusedForwardParams : FusedRows, ForwardSums {};

// The histograms of the dot products of both.
struct FusedCountsParams : FusedRows {
  const int64_t* places;  // [rows], which of the counts are an anchor's
  int32_t* neg_counts;    // [A, kScoreBins] in (0) and out
  int32_t* pos_counts;    // [A, kScoreBins] in (0) and out
};

// Anchors that are contrasted with each other.
struct SymmetricRows {
  ConstRows anchors;  // [rows, D] sorted by label, of fused_dtype(); D of bf16 padded with 0 to be even
  int64_t num_rows, channels;
  const int32_t* anchor_labels;  // [rows], ascending, all >= 0
  const int64_t* anchor_index;   // [rows], or null without exclude_self
  void* panels;  // scratch, of the anchors' type: all rows, up to a multiple of kSymmetricTile, of D, up to a
                 // multiple of 32; of the backward twice that
  int32_t threads;
};

struct SymmetricForwardParams : SymmetricRows, ForwardSums {};  // negatives and positives are not used

struct SymmetricCountsParams : SymmetricRows {
  const int64_t* places;  // [rows], which of the counts are an anchor's
  int32_t* neg_counts;    // [A, kScoreBins] in (0) and out
  int32_t* pos_counts;    // [A, kScoreBins] in (0) and out
};

struct SymmetricBackwardParams : SymmetricRows {
  float scale;
  const float* neg_min;       // [rows] or null, as in the forward
  const float* pos_max;       // [rows] or null
  const float* neg_lse_log2;  // [rows], +inf where there is no negative
  const float* push;          // [rows], of the negatives: g S / (|P| temperature)
  const float* pull;          // [rows], of the positives: g / (|P| temperature)
  float* residual;            // [rows] in (0), scratch: what rounding left of the weights; unused by fp32
  float* grad;                // [rows, D] in (0) and out
};

// The functions that are built once per instruction set: the steps of InfoNCE between torch's matrix
// products; those of its passes that have products of their own (null where there are none); and the
// two passes of enqueue over the map, for the pixels' squares, sums[pixel] += plane[pixel]^2 over all planes,
// and for the class sums of one or two channels at a time, strands[label][channel][lane] += plane[pixel] *
// weights[pixel].
struct VectorKernels {
  void (*widen)(const WidenParams&);
  void (*negatives)(const NegativesParams&);
  void (*positives)(const PositivesParams&);
  void (*count_scores)(const CountScoresParams&);
  void (*finish)(const FinishParams&);
  void (*score_gradients)(const ScoreGradientParams&);
  void (*add_squares)(DType dtype, const void* planes, int64_t num_planes, int64_t stride, int64_t size,
                      float* sums);
  void (*add_groups)(const Group* groups, int64_t num_groups, const float* const* planes, int num_planes,
                     const float* weights, float* strands);
  void (*fused_forward)(const FusedForwardParams&);
  void (*fused_counts)(const FusedCountsParams&);
  void (*symmetric_forward)(const SymmetricForwardParams&);
  void (*symmetric_counts)(const SymmetricCountsParams&);
  void (*symmetric_backward)(const SymmetricBackwardParams&);
  bool multiplies_bfloat16;
};

#define PXC_DECLARE_STEPS(isa)                                                            \
  namespace isa {                                                                         \
  void widen(const WidenParams&);                                                         \
  void negatives(const NegativesParams&);                                                 \
  void positives(const PositivesParams&);                                                 \
  void count_scores(const CountScoresParams&);                                            \
  void finish(const FinishParams&);                                                       \
  void score_gradients(const ScoreGradientParams&);                                       \
  void add_squares(DType, const void*, int64_t, int64_t, int64_t, float*);                \
  void add_groups(const Group*, int64_t, const float* const*, int, const float*, float*); \
  }
#define PXC_DECLARE_FUSED(isa)                             \
  namespace isa {                                          \
  void fused_forward(const FusedForwardParams&);           \
  void fused_counts(const FusedCountsParams&);             \
  void symmetric_forward(const SymmetricForwardParams&);   \
  void symmetric_counts(const SymmetricCountsParams&);     \
  void symmetric_backward(const SymmetricBackwardParams&); \
  }
PXC_DECLARE_STEPS(portable)
PXC_DECLARE_STEPS(avx2)
PXC_DECLARE_STEPS(avx512)
PXC_DECLARE_FUSED(avx2)
PXC_DECLARE_FUSED(avx512)
PXC_DECLARE_FUSED(avx512_bf16)
#undef PXC_DECLARE_STEPS
#undef PXC_DECLARE_FUSED

// The kernels in use: those of the best instruction set that the processor has, unless another was selected.
const VectorKernels& vector_kernels();
const char* instruction_set();
// The DType in which the fused forward multiplies keys of this one; -1 if torch does the products.
int fused_dtype(int keys_dtype);
std::vector<std::string> instruction_sets();           // those the processor has, best first
void select_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace pxc::cpu
