// The CUDA kernels' launchers, as bindings.cpp sees them. Each enqueues its kernels on the caller's stream
// and returns; none waits for the device or allocates. They throw std::runtime_error if a launch is refused.
#pragma once

#include <string>

#include "../params.h"

namespace pxc::cuda {

std::string runtime_problem();  // why the module's CUDA runtime does not work; empty if it does

void sampling(const SamplingParams&);
void gather(const GatherParams&);
void gather_backward(const GatherBackwardParams&);
void collect(const CollectParams&);
void write(const WriteParams&);

void infonce_forward(const InfonceForwardParams&);
void infonce_backward(const InfonceBackwardParams&);
void mined_forward(const MinedForwardParams&);
void mined_backward(const MinedBackwardParams&);
void score_counts(const ScoreCountsParams&);

// How a pass is cut into tiles on a device, which may depend on the number of anchors and keys. Rows are
// anchors and columns are keys in the forward's two passes; in the backward it is the other way round. The
// range of the columns' labels is known for each piece of a tile.
struct InfonceTile {
  int rows, columns, piece;
  int64_t shared;  // bytes of a block
  int resident;    // blocks that a multiprocessor runs at a time
};
InfonceTile infonce_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels,
                                   int64_t num_anchors, int64_t num_keys);
InfonceTile infonce_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels);
InfonceTile infonce_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels);
InfonceTile mined_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels);
InfonceTile mined_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels);
InfonceTile mined_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels);
InfonceTile score_counts_tile(int device, int32_t dtype, bool full_float32, int64_t channels);

}  // namespace pxc::cuda
