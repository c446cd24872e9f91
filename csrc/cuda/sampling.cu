#include "cuda.h"
#include "sampling.cuh"

namespace pxc::cuda {

void sampling(const SamplingParams& p) {
  const Pools pools = {p.labels,
                       p.predictions,
                       p.priority,
                       p.pixels,
                       p.num_classes,
                       p.ignore_index,
                       (p.pixels + kChunk - 1) / kChunk,
                       p.num_classes * kKinds,
                       p.pool_keys,
                       p.pool_starts};
  sort_pools(p, "sampling, sort", pools, p.batch);
  launch(p, "sampling, plan", sampling_plan_kernel, dim3(1), kPlanThreads, SelectMemory::kBytes, p, pools);
  launch(p, "sampling, select", sampling_select_kernel, dim3(unsigned(p.batch * pools.pools)), kSelectThreads,
         PixelMemory::kBytes, p, pools);
}

}  // namespace pxc::cuda
