// Launchers of the InfoNCE kernels: which tile serves which rows, and the order of the launches.
#include <algorithm>
#include <string>

#include "cuda.h"
#include "infonce.cuh"

namespace pxc::cuda {
namespace {

template <class Tile>
struct Use {
  using type = Tile;
};

// Calls visit with the tile for an element type and a number of channels.
template <class Math, class Visit>
auto with_channels(int64_t channels, Visit visit) {
  if (channels <= 256) return visit(Use<Tile<Math, 256>>{});
  if (channels <= kMaxChannels) return visit(Use<Tile<Math, kMaxChannels>>{});
  throw std::invalid_argument("InfoNCE takes up to " + std::to_string(kMaxChannels) + " channels, got " +
                              std::to_string(channels));
}

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The shared memory of a block, if a row has `row_stride` bytes there.
template <class Tile>
size_t shared_bytes_of(Pass pass, int64_t row_stride) {
  switch (pass) {
    case Pass::kNegatives:
      return negatives_bytes<Tile>(row_stride);
    case Pass::kPositives:
      return positives_bytes<Tile>(row_stride);
    default:
      return backward_bytes<Tile>(row_stride);
  }
}

// The bytes of a row of so many channels in shared memory.
template <class Tile>
int64_t row_stride_of(int64_t channels) {
  return blocks_of(2 * Tile::kPlanes * channels, 128) * 128;
}

// Calls visit with the tile for a pass of the forward: rows of the usual lengths have a tile of their own,
// and a larger one where a multiprocessor has room for it.
template <class Math, Pass kPass, class Visit>
auto with_forward_tile(int device, int64_t channels, int64_t num_anchors, int64_t num_keys, Visit visit) {
  const auto fits = [&](auto use) {
    using Tile = typename decltype(use)::type;
    const size_t block =
        shared_bytes_of<Tile>(kPass, Tile::kMaxRowBytes) + 1024;  // the device reserves 1 KB per block
    return Tile::kResident * block <= shared_of_multiprocessor(device);
  };
  const auto larger_or = [&](auto larger, auto other) { return fits(larger) ? visit(larger) : visit(other); };
  if constexpr (Math::kPlanes == 1) {
    if (channels == 64) return visit(Use<Tile<Math, 64, true, 2>>{});
    if (channels == 128) return visit(Use<Tile<Math, 128, true, 2>>{});
    if (channels == 512)
      return larger_or(Use<Tile<Math, 512, true, 4, true>>{}, Use<Tile<Math, 512, true>>{});
    if (channels == 256) {
      if constexpr (kPass == Pass::kPositives) {
        return visit(Use<Tile<Math, 256, true>>{});
      } else {
        // Few anchors would leave half of a wide tile's rows idle, and few tiles most multiprocessors.
        using Wide = Tile<Math, 256, true, 4, true>;
        const int64_t tiles = blocks_of(num_anchors, Wide::kBlockA) * blocks_of(num_keys, Wide::kBlockK);
        const bool pays = num_anchors > Wide::kBlockA / 2 && tiles >= multiprocessors(device);
        if (pays && fits(Use<Wide>{})) return visit(Use<Wide>{});
        return larger_or(Use<Tile<Math, 256, true, 2>>{}, Use<Tile<Math, 256, true>>{});
      }
    }
  } else {
    if (channels == 64) return visit(Use<Tile<Math, 64, true>>{});
    if (channels == 128) return visit(Use<Tile<Math, 128, true>>{});
    if (channels == 256)
      return larger_or(Use<Tile<Math, 256, true, 4, true>>{}, Use<Tile<Math, 256, true>>{});
  }
  return with_channels<Math>(channels, visit);
}

// Calls visit with the arithmetic of an element type.
template <class Visit>
auto with_math(DType dtype, bool full_float32, Visit visit) {
  switch (dtype) {
    case DType::kFloat16:
      return visit(Use<Math<Half, 1>>{});
    case DType::kBFloat16:
      return visit(Use<Math<BFloat16, 1>>{});
    default:
      return full_float32 ? visit(Use<Math<Half, 2>>{}) : visit(Use<Math<Half, 1>>{});
  }
}

// Splits fp32 rows into planes, which then take the place of the rows.
template <class Math, class Params>
Params with_planes(Params p) {
  if (p.anchors.dtype != DType::kFloat32) return p;
  const dim3 grid(unsigned(p.plane_blocks), p.keys.data == nullptr ? 1 : 2);
  for (const bool again : {false, true}) {
    launch(p, "infonce_planes_kernel", infonce_planes_kernel<Math::kPlanes, Params>, grid, kPlaneThreads,
           shared_bytes<float>(kPlaneThreads / kWarp), p, again);
  }
  p.anchors.data = p.anchor_planes;
  if (p.keys.data != nullptr) p.keys.data = p.key_planes;
  return p;
}

// Sorts the anchors, and finds the ranges of the columns' labels: those of keys in the same launch, those of
// anchors in a launch after the sort.
template <int kPiece, class Params>
void order_anchors(const Params& p, bool columns_are_keys) {
  const int64_t ranges_of_keys = columns_are_keys ? blocks_of(p.num_keys, kOrderThreads) : 0;
  const int64_t tiles = blocks_of(p.num_anchors, kTileKeys);
  launch(p, "infonce_order_kernel", infonce_order_kernel<Params, kPiece>,
         dim3(unsigned(tiles + ranges_of_keys)), kOrderThreads, shared_bytes<uint64_t>(kTileKeys), p);
  if (tiles > 1) {
    launch(p, "infonce_rank_kernel", infonce_rank_kernel<Params>,
           dim3(unsigned(blocks_of(p.num_anchors, kOrderThreads / kWarp))), kOrderThreads, 0, p, tiles);
  }
  if (columns_are_keys) return;
  launch(p, "infonce_label_ranges_kernel", infonce_label_ranges_kernel<kPiece>,
         dim3(unsigned(blocks_of(p.num_anchors, kOrderThreads))), kOrderThreads, 0, p.sorted_labels,
         p.num_anchors, p.label_ranges);
}

template <class Tile, class Kernel>
InfonceTile describe(int device, Kernel kernel, size_t shared) {
  return {
      .rows = Tile::kBlockA,
      .columns = Tile::kBlockK,
      .piece = Tile::S::kColumns,
      .shared = int64_t(shared),
      .resident = resident_blocks(device, "infonce", kernel, Tile::kThreads, shared),
  };
}

}  // namespace

InfonceTile infonce_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels,
                                   int64_t num_anchors, int64_t num_keys) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    constexpr Pass kPass = Pass::kNegatives;
    using Math = typename decltype(math)::type;
    return with_forward_tile<Math, kPass>(device, channels, num_anchors, num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_fwd_negatives_kernel<Tile>,
                            shared_bytes_of<Tile>(kPass, row_stride_of<Tile>(channels)));
    });
  });
}

InfonceTile infonce_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels,
                                   int64_t num_anchors, int64_t num_keys) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    constexpr Pass kPass = Pass::kPositives;
    using Math = typename decltype(math)::type;
    return with_forward_tile<Math, kPass>(device, channels, num_anchors, num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_fwd_positives_kernel<Tile>,
                            shared_bytes_of<Tile>(kPass, row_stride_of<Tile>(channels)));
    });
  });
}

InfonceTile infonce_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_channels<typename decltype(math)::type>(channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_bwd_keys_kernel<Tile>,
                            shared_bytes_of<Tile>(Pass::kBackward, row_stride_of<Tile>(channels)));
    });
  });
}

void infonce_forward(const InfonceForwardParams& given) {
  if (given.num_anchors == 0) return;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    const InfonceForwardParams p = with_planes<Math>(given);
    with_forward_tile<Math, Pass::kNegatives>(p.device, p.channels, p.num_anchors, p.num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      order_anchors<Tile::S::kColumns>(p, p.keys.data != nullptr);  // pass 2 has pieces of the same length
      launch(p, "infonce_fwd_negatives_kernel", infonce_fwd_negatives_kernel<Tile>,
             dim3(unsigned(blocks_of(p.num_anchors, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kNegatives, row_stride_of<Tile>(p.channels)), p);
    });
    with_forward_tile<Math, Pass::kPositives>(p.device, p.channels, p.num_anchors, p.num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      // Only the device knows how many classes there are: it chooses the splits, and a block may take several
      // pieces of work.
      launch(p, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile>,
             dim3(unsigned(p.positive_blocks)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kPositives, row_stride_of<Tile>(p.channels)), p);
    });
    const unsigned threads =
        kFinishTeam * unsigned(std::clamp<int64_t>(p.splits / kSplitsOfTeam, 1, kMostFinishTeams));
    launch(p, "infonce_fwd_finish_kernel", infonce_fwd_finish_kernel, dim3(unsigned(p.num_anchors)), threads,
           shared_bytes<float4>(threads) + 2 * shared_bytes<float>(size_t(p.splits)), p, kWeightBias<Math>,
           float(kSigmaBias<Math>));
  });
}

void infonce_backward(const InfonceBackwardParams& given) {
  const int64_t num_rows = given.keys.data == nullptr ? given.num_anchors : given.num_keys;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    const InfonceBackwardParams p = with_planes<Math>(given);
    with_channels<Math>(p.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      order_anchors<Tile::S::kColumns>(p, false);
      launch(p, "infonce_bwd_keys_kernel", infonce_bwd_keys_kernel<Tile>,
             dim3(unsigned(blocks_of(num_rows, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kBackward, row_stride_of<Tile>(p.channels)), p);
    });
  });
  if (given.grad_parts == nullptr) return;
  launch(given, "infonce_bwd_finish_kernel", infonce_bwd_finish_kernel,
         dim3(unsigned(blocks_of(num_rows * given.grad_channels, kBackwardFinishThreads))),
         kBackwardFinishThreads, 0, given);
}

}  // namespace pxc::cuda
