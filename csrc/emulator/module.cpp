// The emulated CUDA kernels as a Python module, in which they stand as in the compiled one.
#include "../cuda/bindings.h"

PYBIND11_MODULE(_C, m) {
  pybind11::module_ gpu = m.def_submodule("cuda");
  pxc::cuda::def_kernels(gpu);
}
