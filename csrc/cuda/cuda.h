// The CUDA kernels' launchers, as bindings.cpp sees them. Each enqueues its kernels on the caller's stream and
// returns; none waits for the device or allocates. They throw std::runtime_error if a launch is refused.
#pragma once

#include "../params.h"

namespace pxc::cuda {}  // namespace pxc::cuda
