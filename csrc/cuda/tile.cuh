// How rows are multiplied and cut: the arithmetic of an element type, the tiles of rows and columns, and the
// order in which a tile lies in shared memory.
#pragma once

#include <type_traits>

#include "../portable.h"

namespace pxc::cuda {

enum class Pass { kNegatives, kPositives, kBackward };

// How rows are multiplied. With one plane they are 16-bit numbers. With two, a row is fp16 numbers and,
// behind them, what these leave of the fp32 row: three products of the planes keep fp32's accuracy.
template <class T, int kPlanes_>
struct Math {
  using Element = T;
  static constexpr int kPlanes = kPlanes_;
  // fp16 weights times 2^kWeightBias: the largest is 2^15 with the slack, and few fall among the subnormals.
  static constexpr float kWeightBias = std::is_same_v<T, Half> ? 7.f : 0.f;
  // Likewise of sigma, which is 1 at most, and small where an anchor's class has been learnt.
  static constexpr float kSigmaBias = std::is_same_v<T, Half> ? 15.f : 0.f;
  // bf16 weights err by 2e-3 each, which is much where they are all alike, as sigma of a class is, and in
  // the gradient of a key, which few anchors make up. Only the pass over the negatives takes bf16's whole.
  static constexpr int kWeightParts = kPlanes == 2 || std::is_same_v<T, BFloat16> ? 2 : 1;
  static constexpr int kNegativeParts = kPlanes;
};

// The tiles, by the bytes of the longest row. With one piece of columns all fit the 99 KB of the smallest
// device, most twice the 163 KB of an A100; outputs take up to 128 registers a thread. A wide one is alone on
// a multiprocessor: a warp has twice as many rows, and reads less for every product.
template <int kMaxRowBytes, bool kWide = false>
struct Shape {
  static_assert(kMaxRowBytes <= 512, "longer rows have shapes of their own");
  static constexpr int kRowWarps = 2, kColWarps = 2, kFragments = 2, kColumns = 32, kResident = 2;
};
template <>
struct Shape<512, true> {
  static constexpr int kRowWarps = 2, kColWarps = 4, kFragments = 4, kColumns = 32, kResident = 1;
};
template <>
struct Shape<1024> {
  static constexpr int kRowWarps = 2, kColWarps = 2, kFragments = 1, kColumns = 16, kResident = 2;
};
template <>
struct Shape<1024, true> {
  static constexpr int kRowWarps = 2, kColWarps = 4, kFragments = 2, kColumns = 16, kResident = 1;
};
template <>
struct Shape<2048> {
  static constexpr int kRowWarps = 1, kColWarps = 2, kFragments = 1, kColumns = 16, kResident = 2;
};

// kFull: all rows are as long as the longest, so that every address in a tile is a base and a constant.
// kPieces: how many times the shape's columns make a tile, whose labels are known by these pieces.
template <class Math_, int kMaxChannels, bool kFull_ = false, int kPieces_ = 1, bool kWide = false>
struct Tile : Math_, Shape<2 * Math_::kPlanes * kMaxChannels, kWide> {
  using T = typename Math_::Element;
  using S = Shape<2 * Math_::kPlanes * kMaxChannels, kWide>;
  static_assert(sizeof(T) == 2, "of fp32 rows, planes are multiplied");
  static constexpr bool kFull = kFull_;
  static constexpr int kPieces = kPieces_;
  static constexpr int kMaxRowBytes = 2 * Math_::kPlanes * kMaxChannels;
  static constexpr int kBlockA = S::kRowWarps * S::kFragments * 16;
  static constexpr int kBlockK = kPieces * S::kColumns;
  static constexpr int kThreads = S::kRowWarps * S::kColWarps * kWarp;
  static constexpr int kScoreCols = kBlockK / S::kColWarps / 8;  // 8-wide pieces of S that a warp computes
  static constexpr int kOutputCols = kMaxChannels / S::kColWarps / 8;  // likewise of the output

  // Of a block's shared memory. The pass over the negatives, which has the largest tiles, keeps labels of the
  // columns alone beside them: 128 x 128 tiles of 512 bytes a row take all that an H100 has, to the byte.
  static size_t bytes(int64_t row_stride, Pass pass) {
    const bool of_negatives = pass == Pass::kNegatives;
    const int parts = of_negatives ? Math_::kNegativeParts : Math_::kWeightParts;
    return shared_bytes<unsigned char>((kBlockA + 2 * kBlockK) * row_stride) +
           shared_bytes<T>(parts * kBlockA * kBlockK) + shared_bytes<float>(S::kColWarps * kBlockA) +
           (of_negatives ? shared_bytes<int>(2 * kBlockK) : shared_bytes<float4>(2 * kBlockK + kBlockA));
  }
};

// --- shared memory: rows of 16-byte chunks, in an order that keeps eight rows off each other's banks ---

// Where chunk `chunk` of row `row` lies, for rows of kChunks chunks: 2, 4, or a multiple of 8. ldmatrix reads
// one chunk of eight rows at a time.
template <int kChunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  if constexpr (kChunks % 8 == 0) return chunk ^ (row & 7);
  if constexpr (kChunks == 4) return chunk ^ ((row >> 1 & 1) << 1 | (row >> 2 & 1));
  return chunk ^ (row >> 2 & 1);
}

// The byte at which a chunk of a tile begins; row_stride is a multiple of 128.
__device__ __forceinline__ int tile_offset(int row, int chunk, int row_stride) {
  return row * row_stride + swizzled<8>(row, chunk) * 16;
}

// The same of chunk ^ `more`, from the offset of `chunk`: what is known at compile time costs no register.
__device__ __forceinline__ int offset_further(int offset, int more) {
  return (offset ^ more % 8 * 16) + more / 8 * 128;
}

}  // namespace pxc::cuda
