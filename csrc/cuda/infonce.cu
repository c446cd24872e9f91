// Launchers of the InfoNCE kernels: which tile serves which rows, and the order of the launches.
#include "infonce_launch.h"

namespace pxc::cuda {
namespace {

// The shared memory of a block, if a row has `row_stride` bytes there.
template <class Tile>
size_t shared_bytes_of(Pass pass, int64_t row_stride) {
  switch (pass) {
    case Pass::kNegatives:
      return negatives_bytes<Tile, false>(row_stride);
    case Pass::kPositives:
      return positives_bytes<Tile>(row_stride);
    default:
      return backward_bytes<Tile, false>(row_stride);
  }
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

}  // namespace

InfonceTile infonce_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels,
                                   int64_t num_anchors, int64_t num_keys) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    constexpr Pass kPass = Pass::kNegatives;
    using Math = typename decltype(math)::type;
    return with_forward_tile<Math, kPass>(device, channels, num_anchors, num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_fwd_negatives_kernel<Tile, InfonceForwardParams>,
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
      return describe<Tile>(device, infonce_fwd_positives_kernel<Tile, InfonceForwardParams>,
                            shared_bytes_of<Tile>(kPass, row_stride_of<Tile>(channels)));
    });
  });
}

InfonceTile infonce_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_channels<typename decltype(math)::type>(channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_bwd_keys_kernel<Tile, InfonceBackwardParams>,
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
      launch(p, "infonce_fwd_negatives_kernel", infonce_fwd_negatives_kernel<Tile, InfonceForwardParams>,
             dim3(unsigned(blocks_of(p.num_anchors, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kNegatives, row_stride_of<Tile>(p.channels)), p);
    });
    with_forward_tile<Math, Pass::kPositives>(p.device, p.channels, p.num_anchors, p.num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      // Only the device knows how many classes there are: it chooses the splits, and a block may take several
      // pieces of work.
      launch(p, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile, InfonceForwardParams>,
             dim3(unsigned(p.positive_blocks)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kPositives, row_stride_of<Tile>(p.channels)), p);
    });
    finish_forward<Math>(p);
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
      launch(p, "infonce_bwd_keys_kernel", infonce_bwd_keys_kernel<Tile, InfonceBackwardParams>,
             dim3(unsigned(blocks_of(num_rows, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             shared_bytes_of<Tile>(Pass::kBackward, row_stride_of<Tile>(p.channels)), p);
    });
  });
  finish_backward(given, num_rows);
}

}  // namespace pxc::cuda
