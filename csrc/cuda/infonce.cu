// Launchers of the InfoNCE kernels: which tile serves which rows, and the order of the launches.
#include <string>

#include "cuda.h"
#include "infonce.cuh"

namespace pxc::cuda {
namespace {

template <class Tile>
struct Use {
  using type = Tile;
};

// Calls visit with the tile of an element type and a number of channels.
template <class Math, class Visit>
auto with_channels(int64_t channels, Visit visit) {
  if (channels <= 256) return visit(Use<Tile<Math, 256>>{});
  if (channels <= 512) return visit(Use<Tile<Math, 512>>{});
  throw std::invalid_argument("InfoNCE takes up to 512 channels, got " + std::to_string(channels));
}

template <class Visit>
auto with_tile(int32_t dtype, bool full_float32, int64_t channels, Visit visit) {
  switch (DType(dtype)) {
    case DType::kFloat16:
      return with_channels<Math<Half, 1>>(channels, visit);
    case DType::kBFloat16:
      return with_channels<Math<BFloat16, 1>>(channels, visit);
    default:
      return full_float32 ? with_channels<Math<float, 2>>(channels, visit)
                          : with_channels<Math<float, 1>>(channels, visit);
  }
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class Params>
void order_anchors(const Params& p) {
  launch(p, "infonce_order_kernel", infonce_order_kernel<Params>,
         dim3(unsigned(blocks_of(p.num_anchors, kOrderThreads))), kOrderThreads,
         shared_bytes<int>(kOrderThreads), p);
}

template <int kBlockK>
void find_ranges(const Launch& on, const int32_t* labels, int64_t count, int32_t* ranges) {
  launch(on, "infonce_label_ranges_kernel", infonce_label_ranges_kernel<kBlockK>,
         dim3(unsigned(blocks_of(count, kOrderThreads))), kOrderThreads, 0, labels, count,
         reinterpret_cast<int2*>(ranges));
}

template <class Tile>
size_t shared_bytes_of(int64_t channels) {
  return Tile::bytes(blocks_of(channels * int64_t(sizeof(typename Tile::T)), 128) * 128);
}

}  // namespace

std::tuple<int, int, int64_t> infonce_tile(int32_t dtype, int64_t channels) {
  return with_tile(dtype, true, channels, [&](auto use) {
    using Tile = typename decltype(use)::type;
    return std::tuple<int, int, int64_t>(Tile::kBlockA, Tile::kBlockK, shared_bytes_of<Tile>(channels));
  });
}

void infonce_forward(const InfonceForwardParams& p) {
  const bool in_batch = p.keys == nullptr;
  const int64_t num_keys = in_batch ? p.num_anchors : p.num_keys;
  order_anchors(p);
  with_tile(p.rows_dtype, p.full_float32, p.channels, [&](auto use) {
    using Tile = typename decltype(use)::type;
    find_ranges<Tile::kBlockK>(p, in_batch ? p.sorted_labels : p.key_labels, num_keys, p.label_ranges);
    const dim3 grid(unsigned(blocks_of(p.num_anchors, Tile::kBlockA)), unsigned(p.splits));
    const size_t shared = shared_bytes_of<Tile>(p.channels);
    launch(p, "infonce_fwd_negatives_kernel", infonce_fwd_negatives_kernel<Tile>, grid, Tile::kThreads,
           shared, p);
    launch(p, "infonce_fwd_combine_kernel", infonce_fwd_combine_kernel,
           dim3(unsigned(blocks_of(p.num_anchors, kCombineThreads / kWarp))), kCombineThreads, 0, p);
    launch(p, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile>, grid, Tile::kThreads,
           shared, p);
    launch(p, "infonce_fwd_finish_kernel", infonce_fwd_finish_kernel, dim3(unsigned(p.num_anchors)),
           kFinishThreads, shared_bytes<float2>(size_t(p.splits)), p, Tile::kWeightBias);
  });
}

void infonce_backward(const InfonceBackwardParams& p) {
  const int64_t num_rows = p.keys == nullptr ? p.num_anchors : p.num_keys;
  order_anchors(p);
  with_tile(p.rows_dtype, p.full_float32, p.channels, [&](auto use) {
    using Tile = typename decltype(use)::type;
    find_ranges<Tile::kBlockK>(p, p.sorted_labels, p.num_anchors, p.label_ranges);
    const dim3 grid(unsigned(blocks_of(num_rows, Tile::kBlockA)), unsigned(p.splits));
    launch(p, "infonce_bwd_keys_kernel", infonce_bwd_keys_kernel<Tile>, grid, Tile::kThreads,
           shared_bytes_of<Tile>(p.channels), p);
  });
  if (p.grad_parts == nullptr) return;
  launch(p, "infonce_bwd_finish_kernel", infonce_bwd_finish_kernel,
         dim3(unsigned(blocks_of(num_rows * p.grad_channels, kOrderThreads))), kOrderThreads, 0, p);
}

}  // namespace pxc::cuda
