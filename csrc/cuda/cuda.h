// The CUDA kernels' launchers, as bindings.cpp sees them. Each enqueues its kernels on the caller's stream
// and returns; none waits for the device or allocates. They throw std::runtime_error if a launch is refused.
#pragma once

#include <string>
#include <tuple>

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
// Rows and columns of a tile, which are anchors and keys in the forward, keys and anchors in the backward;
// and the bytes of shared memory that its block takes.
std::tuple<int, int, int64_t> infonce_tile(int32_t dtype, int64_t channels);

}  // namespace pxc::cuda
