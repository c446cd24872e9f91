#include <algorithm>
#include <type_traits>

#include "cuda.h"
#include "dtype.h"
#include "enqueue.cuh"

namespace pxc::cuda {

void collect(const CollectParams& p) {
  const int64_t pixels = p.height * p.width;
  const Pools pools = {p.labels,
                       nullptr,
                       p.priority,
                       pixels,
                       p.num_classes,
                       p.ignore_index,
                       (pixels + kChunk - 1) / kChunk,
                       p.num_classes,
                       p.pool_keys,
                       p.pool_starts};
  sort_pools(p, "collect, sort", pools, p.batch);

  RegionTile tile = {p.channels > 128  ? 32
                     : p.channels > 64 ? 64
                                       : 128,
                     int(std::min<int64_t>(p.channels, kMaxSlice)), false};
  size_t shared = shared_bytes<int>(kChunk) + shared_bytes<float>(size_t(tile.slice) * (tile.strip + 1)) +
                  shared_bytes<float>(kRegionThreads) + shared_bytes<Weight>(tile.strip);
  const size_t sums = shared_bytes<float>(size_t(p.num_classes) * p.channels);
  tile.sums_in_shared = shared + sums <= kMaxShared;
  if (tile.sums_in_shared) shared += sums;
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    launch(p, "collect, regions", collect_regions_kernel<In>, dim3(unsigned(p.batch * pools.chunks)),
           kRegionThreads, shared, p, pools, tile);
    with_dtype(p.rows_dtype, [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      launch(p, "collect, rows", collect_rows_kernel<In, Out>, dim3(unsigned(p.batch * p.num_classes)),
             kSelectThreads, PixelMemory::kBytes, p, pools);
    });
  });
}

void write(const WriteParams& p) {
  const dim3 grid(unsigned(2 * p.num_classes));
  constexpr size_t kShared = shared_bytes<int>(kMaxWarps) + shared_bytes<int64_t>(kWriteThreads);
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  if ((address(p.rows) | address(p.keys) | uintptr_t(p.row_bytes)) % sizeof(uint32_t) == 0) {
    launch(p, "write", write_kernel<uint32_t>, grid, kWriteThreads, kShared, p);
  } else {
    launch(p, "write", write_kernel<uint16_t>, grid, kWriteThreads, kShared, p);
  }
}

}  // namespace pxc::cuda
