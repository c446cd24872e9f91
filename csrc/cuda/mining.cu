// Launchers of example mining: the histograms that it ranks by, and InfoNCE of the pairs that it keeps.
#include "infonce_counts.cuh"
#include "infonce_launch.h"

namespace pxc::cuda {
namespace {

// Calls visit with the tile of every pass over anchors and keys. It is the same in all, so that each finds
// the same score for a pair, to the bit.
template <class Math, class Visit>
auto with_mined_tile(int64_t channels, Visit visit) {
  if (channels == 256) return visit(Use<Tile<Math, 256, true>>{});
  return with_channels<Math>(channels, visit);
}

// Describes the tile that serves rows of so many channels, by describe(Use<Tile>, bytes of a row).
template <class Describe>
InfonceTile mined_tile(int32_t dtype, bool full_float32, int64_t channels, Describe describe) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_mined_tile<typename decltype(math)::type>(channels, [&](auto use) {
      return describe(use, row_stride_of<typename decltype(use)::type>(channels));
    });
  });
}

// The negatives in the keys' place, as pass 1 meets them.
template <class Params>
Params with_negatives(Params p) {
  if (p.negatives.data == nullptr) return p;
  p.keys = p.negatives;
  p.key_planes = p.negative_planes;
  p.key_labels = p.negative_labels;
  p.num_keys = p.num_negatives;
  p.label_ranges = p.negative_ranges;
  p.score_scale = p.negative_scale;
  p.unscale = p.negative_unscale;
  return p;
}

// Prepares both sides, and returns them as the two passes meet them.
template <class Params>
struct Passes {
  Params negatives, positives;
};
template <class Math, class Tile, class Params>
Passes<Params> prepare(const Params& given) {
  const bool apart = given.negatives.data != nullptr;
  const Params positives = with_planes<Math>(given);
  const Params negatives = apart ? with_planes<Math>(with_negatives(given)) : positives;
  order_anchors<Tile::S::kColumns>(positives, positives.keys.data != nullptr);
  if (apart) {
    const int64_t blocks = std::max<int64_t>(blocks_of(negatives.num_keys, kOrderThreads), 1);
    launch(given, "infonce_keys_kernel", infonce_keys_kernel<Params, Tile::S::kColumns>,
           dim3(unsigned(blocks)), kOrderThreads, 0, negatives);
  }
  return {negatives, positives};
}

// Counts fit into shared memory beside the largest tile on an A100 and an H100.
template <class Tile>
bool counts_in_shared(int device, int64_t row_stride) {
  return counts_bytes<Tile>(row_stride, true) <= shared_of_block(device);
}

}  // namespace

InfonceTile mined_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return mined_tile(dtype, full_float32, channels, [&](auto use, int64_t row_stride) {
    using Tile = typename decltype(use)::type;
    return describe<Tile>(device, infonce_fwd_negatives_kernel<Tile, MinedForwardParams>,
                          negatives_bytes<Tile, true>(row_stride));
  });
}

InfonceTile mined_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return mined_tile(dtype, full_float32, channels, [&](auto use, int64_t row_stride) {
    using Tile = typename decltype(use)::type;
    return describe<Tile>(device, infonce_fwd_positives_kernel<Tile, MinedForwardParams>,
                          positives_bytes<Tile>(row_stride));
  });
}

InfonceTile score_counts_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return mined_tile(dtype, full_float32, channels, [&](auto use, int64_t row_stride) {
    using Tile = typename decltype(use)::type;
    return describe<Tile>(device, infonce_counts_kernel<Tile, Pass::kNegatives>,
                          counts_bytes<Tile>(row_stride, counts_in_shared<Tile>(device, row_stride)));
  });
}

InfonceTile mined_backward_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_channels<typename decltype(math)::type>(channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_bwd_keys_kernel<Tile, MinedBackwardParams>,
                            backward_bytes<Tile, true>(row_stride_of<Tile>(channels)));
    });
  });
}

void mined_forward(const MinedForwardParams& given) {
  if (given.num_anchors == 0) return;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    with_mined_tile<Math>(given.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      const int64_t row_stride = row_stride_of<Tile>(given.channels);
      const auto [negatives, positives] = prepare<Math, Tile>(given);
      launch(given, "infonce_fwd_negatives_kernel", infonce_fwd_negatives_kernel<Tile, MinedForwardParams>,
             dim3(unsigned(blocks_of(given.num_anchors, Tile::kBlockA)), unsigned(given.splits)),
             Tile::kThreads, negatives_bytes<Tile, true>(row_stride), negatives);
      launch(given, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile, MinedForwardParams>,
             dim3(unsigned(given.positive_blocks)), Tile::kThreads, positives_bytes<Tile>(row_stride),
             positives);
      finish_forward<Math>(positives);
    });
  });
}

void mined_backward(const MinedBackwardParams& given) {
  const int64_t num_rows = given.keys.data == nullptr ? given.num_anchors : given.num_keys;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    const MinedBackwardParams p = with_planes<Math>(given);
    with_channels<Math>(p.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      order_anchors<Tile::S::kColumns>(p, false);
      launch(p, "infonce_bwd_keys_kernel", infonce_bwd_keys_kernel<Tile, MinedBackwardParams>,
             dim3(unsigned(blocks_of(num_rows, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             backward_bytes<Tile, true>(row_stride_of<Tile>(p.channels)), p);
    });
  });
  finish_backward(given, num_rows);
}

void score_counts(const ScoreCountsParams& given) {
  if (given.num_anchors == 0) return;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    with_mined_tile<Math>(given.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      const int64_t row_stride = row_stride_of<Tile>(given.channels);
      const bool in_shared = counts_in_shared<Tile>(given.device, row_stride);
      const auto [negatives, positives] = prepare<Math, Tile>(given);
      const auto count = [&](auto kernel, const ScoreCountsParams& p, int64_t splits, int32_t* counts) {
        launch(p, "infonce_counts_kernel", kernel,
               dim3(unsigned(blocks_of(p.num_anchors, Tile::kBlockA)), unsigned(splits)), Tile::kThreads,
               counts_bytes<Tile>(row_stride, in_shared), p, counts, in_shared);
      };
      count(infonce_counts_kernel<Tile, Pass::kNegatives>, negatives, given.splits, given.neg_counts);
      count(infonce_counts_kernel<Tile, Pass::kPositives>, positives, given.positive_splits,
            given.pos_counts);
    });
  });
}

}  // namespace pxc::cuda
