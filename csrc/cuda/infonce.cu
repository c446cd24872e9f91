// Launchers of the InfoNCE kernels: which tile serves which rows, and the order of the launches.
#include "infonce_launch.h"

namespace pxc::cuda {
namespace {

// The shared memory of a block of the forward, if a row has `row_stride` bytes there.
template <class Tile, Pass kPass>
size_t forward_bytes(int64_t row_stride) {
  if constexpr (kPass == Pass::kNegatives) return negatives_bytes<Tile, false>(row_stride);
  return positives_bytes<Tile>(row_stride);
}

// Calls visit with the tile for a pass of the forward: rows of the usual lengths have a tile of their own,
// and a larger one where a multiprocessor has room for it.
template <class Math, Pass kPass, class Visit>
auto with_forward_tile(int device, int64_t channels, int64_t num_anchors, int64_t num_keys, Visit visit) {
  const auto has_room = [&](auto use) {
    using Tile = typename decltype(use)::type;
    return fits<Tile>(device, forward_bytes<Tile, kPass>(Tile::kMaxRowBytes));
  };
  const auto larger_or = [&](auto larger, auto other) {
    return has_room(larger) ? visit(larger) : visit(other);
  };
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
        if (pays && has_room(Use<Wide>{})) return visit(Use<Wide>{});
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

template <Pass kPass>
InfonceTile forward_tile(int device, int32_t dtype, bool full_float32, int64_t channels, int64_t num_anchors,
                         int64_t num_keys) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    return with_forward_tile<Math, kPass>(device, channels, num_anchors, num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      const size_t shared = forward_bytes<Tile, kPass>(row_stride_of<Tile>(channels));
      if constexpr (kPass == Pass::kNegatives) {  // each pass has tiles that the other is not compiled for
        return describe<Tile>(device, infonce_fwd_negatives_kernel<Tile, InfonceForwardParams>, shared);
      } else {
        return describe<Tile>(device, infonce_fwd_positives_kernel<Tile, InfonceForwardParams>, shared);
      }
    });
  });
}

}  // namespace

InfonceTile infonce_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels,
                                   int64_t num_anchors, int64_t num_keys) {
  return forward_tile<Pass::kNegatives>(device, dtype, full_float32, channels, num_anchors, num_keys);
}

InfonceTile infonce_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return forward_tile<Pass::kPositives>(device, dtype, full_float32, channels, 0, 0);
}

InfonceTile infonce_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_channels<typename decltype(math)::type>(channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_bwd_keys_kernel<Tile, InfonceBackwardParams>,
                            backward_bytes<Tile, false>(row_stride_of<Tile>(channels)));
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
             forward_bytes<Tile, Pass::kNegatives>(row_stride_of<Tile>(p.channels)), p);
    });
    with_forward_tile<Math, Pass::kPositives>(p.device, p.channels, p.num_anchors, p.num_keys, [&](auto use) {
      using Tile = typename decltype(use)::type;
      // Only the device knows how many classes there are: it chooses the splits, and a block may take several
      // pieces of work.
      launch(p, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile, InfonceForwardParams>,
             dim3(unsigned(p.positive_blocks)), Tile::kThreads,
             forward_bytes<Tile, Pass::kPositives>(row_stride_of<Tile>(p.channels)), p);
    });
    finish_forward<Math>(p);
  });
}

void infonce_backward(const InfonceBackwardParams& given) { launch_backward(given); }

}  // namespace pxc::cuda
