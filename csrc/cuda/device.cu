// Asks the module's own CUDA runtime, linked statically, whether it works.
#include "../portable.h"
#include "cuda.h"

namespace pxc::cuda {

std::string runtime_problem() { return pxc::runtime_problem(); }

}  // namespace pxc::cuda
