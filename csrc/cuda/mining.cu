// Launchers of example mining: the histograms that it ranks by, and InfoNCE of the pairs that it keeps.
#include <type_traits>

#include "infonce_counts.cuh"
#include "infonce_launch.h"

namespace pxc::cuda {
namespace {

// Calls visit with the tile of a pass, or of the counts. Rows of 256 channels have larger ones where there is
// room. Whatever the tile, a score is the same to the bit: the histograms and the passes agree about it.
template <class Math, class Visit>
auto with_usual_tile(int64_t channels, Visit visit) {
  if (channels == 256) return visit(Use<Tile<Math, 256, true>>{});
  return with_channels<Math>(channels, visit);
}
template <class Math, class Visit>
auto with_negatives_tile(int device, int64_t channels, Visit visit) {
  using Larger =
      std::conditional_t<Math::kPlanes == 2, Tile<Math, 256, true, 4, true>, Tile<Math, 256, true, 2>>;
  const bool larger = fits<Larger>(device, negatives_bytes<Larger, true>(Larger::kMaxRowBytes));
  if (channels == 256 && larger) return visit(Use<Larger>{});
  return with_usual_tile<Math>(channels, visit);
}
constexpr size_t kLeastShared = 101376;  // bytes that a block may have on any device, least on sm_86

// Calls visit with the tile and whether the counts are in shared memory.
template <class Math, class Visit>
auto with_counts_tile(int device, int64_t channels, Visit visit) {
  using Larger = CountsTile<Math>;
  const bool larger = fits<Larger>(device, counts_bytes<Larger>(Larger::kMaxRowBytes, true));
  if (channels == 256 && larger) return visit(Use<Larger>{}, std::true_type{});
  return with_channels<Math>(channels, [&](auto use) {
    using Tile = typename decltype(use)::type;
    if constexpr (counts_bytes<Tile>(Tile::kMaxRowBytes, true) > kLeastShared) {
      const size_t bytes = counts_bytes<Tile>(row_stride_of<Tile>(channels), true);
      if (bytes > shared_of_block(device)) return visit(use, std::false_type{});
    }
    return visit(use, std::true_type{});
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
  p.key_unscale = p.negative_unscale;
  return p;
}

// Prepares both sides, and returns them as the two passes meet them.
template <class Params>
struct Passes {
  Params negatives, positives;
};
template <class Math, int kPiece, class Params>
Passes<Params> prepare(const Params& given) {
  const bool apart = given.negatives.data != nullptr;
  const Params positives = with_planes<Math>(given);
  const Params negatives = apart ? with_planes<Math>(with_negatives(positives), true) : positives;
  order_anchors<kPiece>(positives, positives.keys.data != nullptr);
  if (apart) {
    const int64_t blocks = std::max<int64_t>(blocks_of(negatives.num_keys, kOrderThreads), 1);
    launch(given, "infonce_keys_kernel", infonce_keys_kernel<Params, kPiece>, dim3(unsigned(blocks)),
           kOrderThreads, 0, negatives);
  }
  return {negatives, positives};
}

}  // namespace

InfonceTile mined_negatives_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_negatives_tile<typename decltype(math)::type>(device, channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_fwd_negatives_kernel<Tile, MinedForwardParams>,
                            negatives_bytes<Tile, true>(row_stride_of<Tile>(channels)));
    });
  });
}

InfonceTile mined_positives_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_usual_tile<typename decltype(math)::type>(channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_fwd_positives_kernel<Tile, MinedForwardParams>,
                            positives_bytes<Tile>(row_stride_of<Tile>(channels)));
    });
  });
}

InfonceTile score_counts_tile(int device, int32_t dtype, bool full_float32, int64_t channels) {
  return with_math(DType(dtype), full_float32, [&](auto math) {
    return with_counts_tile<typename decltype(math)::type>(device, channels, [&](auto use, auto in_shared) {
      using Tile = typename decltype(use)::type;
      return describe<Tile>(device, infonce_counts_kernel<Tile, Pass::kNegatives, in_shared>,
                            counts_bytes<Tile>(row_stride_of<Tile>(channels), in_shared));
    });
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
    with_usual_tile<Math>(given.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      const auto sides = prepare<Math, Tile::S::kColumns>(given);
      with_negatives_tile<Math>(given.device, given.channels, [&](auto of_negatives) {
        using NegativesTile = typename decltype(of_negatives)::type;
        launch(given, "infonce_fwd_negatives_kernel",
               infonce_fwd_negatives_kernel<NegativesTile, MinedForwardParams>,
               dim3(unsigned(blocks_of(given.num_anchors, NegativesTile::kBlockA)), unsigned(given.splits)),
               NegativesTile::kThreads,
               negatives_bytes<NegativesTile, true>(row_stride_of<NegativesTile>(given.channels)),
               sides.negatives);
      });
      launch(given, "infonce_fwd_positives_kernel", infonce_fwd_positives_kernel<Tile, MinedForwardParams>,
             dim3(unsigned(given.positive_blocks)), Tile::kThreads,
             positives_bytes<Tile>(row_stride_of<Tile>(given.channels)), sides.positives);
      finish_forward<Math>(sides.positives);
    });
  });
}

void mined_backward(const MinedBackwardParams& given) { launch_backward(given); }

void score_counts(const ScoreCountsParams& given) {
  if (given.num_anchors == 0) return;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    with_counts_tile<Math>(given.device, given.channels, [&](auto use, auto in_shared) {
      using Tile = typename decltype(use)::type;
      const auto sides = prepare<Math, Tile::S::kColumns>(given);
      const auto count = [&](auto kernel, const ScoreCountsParams& p, int64_t splits, int32_t* counts) {
        const int64_t most = blocks_of(blocks_of(p.num_keys, Tile::kBlockK), splits) * Tile::kBlockK;
        if (most > kMostOfBin) {
          throw std::invalid_argument("score_counts: a block would count " + std::to_string(most) +
                                      " columns of at most " + std::to_string(kMostOfBin));
        }
        launch(p, "infonce_counts_kernel", kernel,
               dim3(unsigned(blocks_of(p.num_anchors, Tile::kBlockA)), unsigned(splits)), Tile::kThreads,
               counts_bytes<Tile>(row_stride_of<Tile>(p.channels), in_shared), p, counts);
      };
      count(infonce_counts_kernel<Tile, Pass::kNegatives, in_shared>, sides.negatives, given.splits,
            given.neg_counts);
      count(infonce_counts_kernel<Tile, Pass::kPositives, in_shared>, sides.positives, given.positive_splits,
            given.pos_counts);
    });
  });
}

}  // namespace pxc::cuda
