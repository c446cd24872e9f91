// The CUDA kernels' launchers, as bindings.cpp sees them. Each enqueues its kernels on the caller's stream and
// returns; none waits for the device or allocates. They throw std::runtime_error if a launch is refused.
#pragma once

#include "../params.h"

namespace pxc::cuda {

void sampling(const SamplingParams&);
void gather(const GatherParams&);
void gather_backward(const GatherBackwardParams&);
void collect(const CollectParams&);
void write(const WriteParams&);

}  // namespace pxc::cuda
