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

// Keys per tile of the fused forward. Smaller tiles would read and write O more often. At D = 256 an fp32
// tile, packed for both products, is 1 MiB and streams through L2.
constexpr int64_t kFusedBlockK = 512;
constexpr int kPanel = 32;  // columns that the fused forward multiplies at a time

// Those of kLanes consecutive pixels of an image that belong to one class.
constexpr int64_t kLanes = 16;
struct Group {
  int64_t label;
  int64_t first;
  uint32_t member[kLanes];  // all ones or zero: a select by `and` keeps a NaN out of the other classes
};

// The functions that are built once per instruction set: the steps of InfoNCE between torch's matrix
// products; its fused forward and histograms, with products of their own (null where there are none); and the
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
  bool multiplies_bfloat16;
};

#define PXC_DECLARE_VECTOR_KERNELS(isa)                                                   \
  namespace isa {                                                                         \
  void widen(const WidenParams&);                                                         \
  void negatives(const NegativesParams&);                                                 \
  void positives(const PositivesParams&);                                                 \
  void count_scores(const CountScoresParams&);                                            \
  void finish(const FinishParams&);                                                       \
  void score_gradients(const ScoreGradientParams&);                                       \
  void add_squares(DType, const void*, int64_t, int64_t, int64_t, float*);                \
  void add_groups(const Group*, int64_t, const float* const*, int, const float*, float*); \
  void fused_forward(const FusedForwardParams&);                                          \
  void fused_counts(const FusedCountsParams&);                                            \
  }
PXC_DECLARE_VECTOR_KERNELS(portable)
PXC_DECLARE_VECTOR_KERNELS(avx2)
PXC_DECLARE_VECTOR_KERNELS(avx512)
#undef PXC_DECLARE_VECTOR_KERNELS
namespace avx512_bf16 {
void fused_forward(const FusedForwardParams&);
void fused_counts(const FusedCountsParams&);
}  // namespace avx512_bf16

// The kernels in use: those of the best instruction set that the processor has, unless another was selected.
const VectorKernels& vector_kernels();
const char* instruction_set();
// The DType in which the fused forward multiplies keys of this one; -1 if torch does the products.
int fused_dtype(int keys_dtype);
std::vector<std::string> instruction_sets();           // those the processor has, best first
void select_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace pxc::cpu
