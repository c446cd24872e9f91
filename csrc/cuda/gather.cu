// Launchers of the gather and of its backward, which sorts the rows by pixel and writes them to a map of
// zeros.
#include <type_traits>

#include "cuda.h"
#include "dtype.h"
#include "gather.cuh"

namespace pxc::cuda {

void gather(const GatherParams& p) {
  const dim3 grid(unsigned((p.num_rows + kRowsPerBlock - 1) / kRowsPerBlock));
  with_dtype(p.map_dtype, [&](auto* in) {
    with_dtype(p.rows.dtype, [&](auto* out) {
      using In = std::remove_pointer_t<decltype(in)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      launch(p, "gather", gather_kernel<In, Out>, grid, kRowThreads, 0, p);
    });
  });
}

void gather_backward(const GatherBackwardParams& p) {
  const dim3 row_blocks(unsigned((p.num_rows + kRowsPerBlock - 1) / kRowsPerBlock));
  with_dtype(p.map_dtype, [&](auto* in) {
    using In = std::remove_pointer_t<decltype(in)>;
    with_dtype(p.grad_rows.dtype, [&](auto* row) {
      using Row = std::remove_pointer_t<decltype(row)>;
      launch(p, "gather_backward, rows", gather_bwd_rows_kernel<In, Row>, row_blocks, kRowThreads, 0, p);
    });
    const int64_t sort_tiles = (p.num_rows + kTileKeys - 1) / kTileKeys;
    launch(p, "gather_backward, sort", gather_bwd_sort_kernel, dim3(unsigned(sort_tiles)), kSortThreads,
           shared_bytes<uint64_t>(kTileKeys), p);
    if (sort_tiles > 1) {
      launch(p, "gather_backward, rank", gather_bwd_rank_kernel, row_blocks, kRowThreads, 0, p, sort_tiles);
    }
    launch(p, "gather_backward, map", gather_bwd_map_kernel<In>, row_blocks, kRowThreads, 0, p);
  });
}

}  // namespace pxc::cuda
