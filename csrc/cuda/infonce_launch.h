// What the launchers of InfoNCE share, mined or not: how rows are multiplied, and what is launched before the
// passes.
#pragma once

#include <algorithm>
#include <string>

#include "cuda.h"
#include "infonce.cuh"

namespace pxc::cuda {

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

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Whether as many blocks as the tile is made for fit into a multiprocessor.
template <class Tile>
bool fits(int device, size_t block) {
  return Tile::kResident * (block + kReservedShared) <= shared_of_multiprocessor(device) &&
         block <= shared_of_block(device);
}

// The bytes of a row of so many channels in shared memory.
template <class Tile>
int64_t row_stride_of(int64_t channels) {
  return blocks_of(2 * Tile::kPlanes * channels, 128) * 128;
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

constexpr int64_t kPlaneUnit = 64;  // the engine reads planes in pieces of so many

// Splits fp32 rows, of both sides or of the keys alone, into planes, which then take the place of the rows.
template <class Math, class Params>
Params with_planes(Params p, bool only_keys = false) {
  if (p.anchors.dtype != DType::kFloat32) return p;
  if (p.channels % kPlaneUnit != 0) {
    throw std::invalid_argument("a plane has a multiple of " + std::to_string(kPlaneUnit) +
                                " channels, got " + std::to_string(p.channels));
  }
  const dim3 grid(unsigned(p.plane_blocks), only_keys || p.keys.data == nullptr ? 1 : 2);
  for (const bool again : {false, true}) {
    launch(p, "infonce_planes_kernel", infonce_planes_kernel<Math::kPlanes, Params>, grid, kPlaneThreads,
           shared_bytes<float>(kPlaneThreads / kWarp), p, only_keys, again);
  }
  if (!only_keys) p.anchors.data = p.anchor_planes;
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
  launch(p, "infonce_anchors_kernel", infonce_anchors_kernel<Params, kPiece>,
         dim3(unsigned(blocks_of(p.num_anchors, kOrderThreads))), kOrderThreads,
         shared_bytes<float>(kOrderThreads / kWarp), p);
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

// The last launch of the forward.
template <class Math, class Params>
void finish_forward(const Params& p) {
  const unsigned threads =
      kFinishTeam * unsigned(std::clamp<int64_t>(p.splits / kSplitsOfTeam, 1, kMostFinishTeams));
  launch(p, "infonce_fwd_finish_kernel", infonce_fwd_finish_kernel<Params>, dim3(unsigned(p.num_anchors)),
         threads, shared_bytes<float4>(threads) + 2 * shared_bytes<float>(size_t(p.splits)), p,
         kWeightBias<Math>, float(kSigmaBias<Math>));
}

// The backward, of all pairs or of those that mining keeps.
template <class Params>
void launch_backward(const Params& given) {
  const int64_t num_rows = given.keys.data == nullptr ? given.num_anchors : given.num_keys;
  with_math(given.anchors.dtype, given.full_float32, [&](auto math) {
    using Math = typename decltype(math)::type;
    const Params p = with_planes<Math>(given);
    with_channels<Math>(p.channels, [&](auto use) {
      using Tile = typename decltype(use)::type;
      order_anchors<Tile::S::kColumns>(p, false);
      launch(p, "infonce_bwd_keys_kernel", infonce_bwd_keys_kernel<Tile, Params>,
             dim3(unsigned(blocks_of(num_rows, Tile::kBlockA)), unsigned(p.splits)), Tile::kThreads,
             backward_bytes<Tile, kMined<Params>>(row_stride_of<Tile>(p.channels)), p);
    });
  });
  if (given.grad_parts == nullptr) return;  // else blocks have shared a walk
  launch(given, "infonce_bwd_finish_kernel", infonce_bwd_finish_kernel<Params>,
         dim3(unsigned(blocks_of(num_rows * given.row_channels, kBackwardFinishThreads))),
         kBackwardFinishThreads, 0, given);
}

}  // namespace pxc::cuda
