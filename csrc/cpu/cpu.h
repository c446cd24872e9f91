// The CPU kernels, as bindings.cpp sees them. They throw BadValue for what only a look at the data shows.
#pragma once

#include <cstdint>

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

// The steps of InfoNCE between the products, built once per instruction set.
struct InfonceSteps {
  void (*widen)(const WidenParams&);
  void (*negatives)(const NegativesParams&);
  void (*positives)(const PositivesParams&);
  void (*finish)(const FinishParams&);
  void (*coefficients)(const CoefficientsParams&);
};

namespace portable {
extern const InfonceSteps infonce_steps;
}
namespace avx2 {
extern const InfonceSteps infonce_steps;
}
namespace avx512 {
extern const InfonceSteps infonce_steps;
}

}  // namespace pxc
