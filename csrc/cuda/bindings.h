// The CUDA kernels as a Python module: a part of the compiled one, and in the emulator all of it.
#pragma once

#include <pybind11/pybind11.h>

namespace pxc::cuda {

void def_kernels(pybind11::module_& m);

}  // namespace pxc::cuda
