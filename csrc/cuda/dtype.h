// One switch over the element types of device memory.
#pragma once

#include "../portable.h"

namespace pxc {

// Calls visit with a null pointer of the element type.
template <class Visit>
void with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return visit(static_cast<BFloat16*>(nullptr));
    default:
      return;  // the seam lets nothing else through
  }
}

}  // namespace pxc
