// Launchers of hard-anchor sampling: sort, plan, select.
#include "cuda.h"
#include "sampling.cuh"

namespace pxc::cuda {

void sampling(const SamplingParams& p) {
  const Pools pools = {
      .labels = p.labels,
      .predictions = p.predictions,
      .priority = p.priority,
      .pixels = p.pixels,
      .num_classes = p.num_classes,
      .ignore_index = p.ignore_index,
      .chunks = (p.pixels + kChunk - 1) / kChunk,
      .pools = p.num_classes * kKinds,
      .keys = p.pool_keys,
      .starts = p.pool_starts,
  };
  sort_pools(p, "sampling, sort", pools, p.batch);
  launch(p, "sampling, plan", sampling_plan_kernel, dim3(1), kPlanThreads, SelectMemory::kBytes, p, pools);
  launch(p, "sampling, select", sampling_select_kernel, dim3(unsigned(p.batch * pools.pools)), kSelectThreads,
         PixelMemory::kBytes, p, pools);
}

}  // namespace pxc::cuda
