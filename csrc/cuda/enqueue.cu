// Launchers of enqueue: how the chunks of a map are staged, and the order of the launches.
#include <algorithm>
#include <type_traits>

#include "cuda.h"
#include "dtype.h"
#include "enqueue.cuh"

namespace pxc::cuda {

namespace {

template <class In, bool kChannelsLast>
size_t shared_bytes_of(const CollectParams& p, const RegionTile& tile) {
  using Stage = pxc::cuda::Stage<In, kChannelsLast>;
  const Stage stage(tile.strip, tile.slice);
  return shared_bytes<In>(2 * size_t(stage.numbers())) +
         shared_bytes<float>(kRegionThreads * Stage::kSquares) + shared_bytes<Weight>(tile.strip) +
         (tile.sums_in_shared ? shared_bytes<float>(size_t(p.num_classes) * p.channels) : 0);
}

// How chunks are staged within so many bytes of shared memory, in strips as long as there is room for: the
// longer a piece of a channel, the fewer pages of memory are open.
template <class In, bool kChannelsLast>
RegionTile region_tile_within(const CollectParams& p, size_t most) {
  RegionTile tile{
      .strip = 128,
      .slice = int(std::min<int64_t>(p.channels, kMaxSlice)),
      .unit = 0,
      .sums_in_shared = false,
  };
  const auto fits = [&] { return shared_bytes_of<In, kChannelsLast>(p, tile) <= most; };
  while (tile.strip > 32 && !fits()) tile.strip /= 2;
  while (tile.slice > 8 && !fits()) tile.slice -= 8;
  tile.sums_in_shared = true;
  tile.sums_in_shared = fits();
  return tile;
}

// Two blocks share a multiprocessor if that costs them no more than shorter strips: one loads while the other
// adds up.
template <class In, bool kChannelsLast>
RegionTile region_tile_of(const CollectParams& p) {
  const size_t alone = shared_of_block(p.device);
  const size_t beside = shared_of_multiprocessor(p.device) / 2 - kReservedShared;
  RegionTile tile = region_tile_within<In, kChannelsLast>(p, alone);
  const RegionTile smaller = region_tile_within<In, kChannelsLast>(p, std::min(alone, beside));
  if (smaller.slice == tile.slice && smaller.sums_in_shared == tile.sums_in_shared) tile = smaller;
  const auto aligned = [&](int unit) {
    const auto is_multiple = [&](int64_t numbers) { return numbers * int64_t(sizeof(In)) % unit == 0; };
    const bool lines = kChannelsLast ? is_multiple(p.channels) && is_multiple(p.stride_row) &&
                                           is_multiple(p.stride_column) && is_multiple(tile.slice)
                                     : is_multiple(p.height * p.width) && is_multiple(p.stride_channel) &&
                                           p.stride_column == 1 && p.stride_row == p.width;
    return lines && is_multiple(p.stride_batch) && reinterpret_cast<uintptr_t>(p.map) % unit == 0;
  };
  tile.unit = aligned(16) ? 16 : aligned(4) ? 4 : 0;
  return tile;
}

template <class In, bool kChannelsLast>
void launch_regions(const CollectParams& p, const Pools& pools) {
  const RegionTile tile = region_tile_of<In, kChannelsLast>(p);
  launch(p, "collect, regions", collect_regions_kernel<In, kChannelsLast>,
         dim3(unsigned(p.batch * pools.chunks)), kRegionThreads, shared_bytes_of<In, kChannelsLast>(p, tile),
         p, pools, tile);
}

}  // namespace

void collect(const CollectParams& p) {
  const int64_t pixels = p.height * p.width;
  const Pools pools = {
      .labels = p.labels,
      .predictions = nullptr,
      .priority = p.priority,
      .pixels = pixels,
      .num_classes = p.num_classes,
      .ignore_index = p.ignore_index,
      .chunks = (pixels + kChunk - 1) / kChunk,
      .pools = p.num_classes,
      .keys = p.pool_keys,
      .starts = p.pool_starts,
  };
  sort_pools(p, "collect, sort", pools, p.batch);
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    if (lanes_take_channels(p.stride_channel, p.stride_column)) {
      launch_regions<In, true>(p, pools);
    } else {
      launch_regions<In, false>(p, pools);
    }
    with_dtype(p.rows.dtype, [&](auto* out) {
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
