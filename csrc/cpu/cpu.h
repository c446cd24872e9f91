// The CPU kernels, as bindings.cpp sees them. They throw BadValue for what only a look at the data shows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace pxc {

// A value that the caller has to explain to the user: where it stands and what it is.
struct BadValue {
  int64_t position, value;
};

void sample_hard_anchors(const SamplingParams&);
void gather(const GatherParams&);
void gather_backward(const GatherBackwardParams&);
void collect(const CollectParams&);
void write(const WriteParams&);
void plan_tiles(const TilesParams&);
void collect_keys(const CollectKeysParams&);

// Of kLanes consecutive pixels of an image those that belong to one class.
constexpr int64_t kLanes = 16;
struct Group {
  int64_t label;
  int64_t first;
  uint32_t member[kLanes];  // all ones or zero: a select by `and` keeps a NaN out of the other classes
};

// What is built once per instruction set: the steps of InfoNCE between the products, and the two readings of
// enqueue: the pixels' squares, sums[pixel] += plane[pixel]^2 over all planes, and the class sums, for one or
// two channels at a time: strands[label][channel][lane] += plane[pixel] * weights[pixel].
struct VectorKernels {
  void (*widen)(const WidenParams&);
  void (*negatives)(const NegativesParams&);
  void (*positives)(const PositivesParams&);
  void (*finish)(const FinishParams&);
  void (*coefficients)(const CoefficientsParams&);
  void (*add_squares)(int32_t dtype, const void* planes, int64_t num_planes, int64_t stride, int64_t size,
                      float* sums);
  void (*add_groups)(const Group* groups, int64_t num_groups, const float* const* planes, int num_planes,
                     const float* weights, float* strands);
};

#define PXC_DECLARE_VECTOR_KERNELS(isa)                                                   \
  namespace isa {                                                                         \
  void widen(const WidenParams&);                                                         \
  void negatives(const NegativesParams&);                                                 \
  void positives(const PositivesParams&);                                                 \
  void finish(const FinishParams&);                                                       \
  void coefficients(const CoefficientsParams&);                                           \
  void add_squares(int32_t, const void*, int64_t, int64_t, int64_t, float*);              \
  void add_groups(const Group*, int64_t, const float* const*, int, const float*, float*); \
  constexpr VectorKernels kVectorKernels = {widen,        negatives,   positives, finish, \
                                            coefficients, add_squares, add_groups};       \
  }
PXC_DECLARE_VECTOR_KERNELS(portable)
#ifdef __x86_64__
PXC_DECLARE_VECTOR_KERNELS(avx2)
PXC_DECLARE_VECTOR_KERNELS(avx512)
#endif
#undef PXC_DECLARE_VECTOR_KERNELS

// The kernels in use: those of the best instruction set that the processor has, unless another was selected.
const VectorKernels& vector_kernels();
const char* instruction_set();
std::vector<std::string> instruction_sets();           // those the processor has, best first
void select_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace pxc
