// How rows are multiplied, cut and laid out: the arithmetic of an element type, the tiles of rows and
// columns, and the order of a tile's chunks in shared memory.
#pragma once

#include "../portable.h"

namespace pxc::cuda {

// How rows are multiplied. With one plane they are 16-bit numbers. With two, an fp32 row is stored as fp16
// numbers followed by their remainders, also fp16; three products of the planes keep fp32's accuracy.
template <class T, int kPlanes_>
struct Math {
  using Element = T;
  static constexpr int kPlanes = kPlanes_;
};

// The tiles, by the bytes of the longest row. With one piece of columns, all fit into the 99 KB of the
// smallest device, and most fit twice into the 163 KB of an A100; outputs take up to 128 registers a thread.
// A wide tile has a multiprocessor to itself: its warps have twice as many rows, and read less for every
// product.
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
// kPieces: how many pieces of the shape's columns make a tile; the range of labels is known for each piece.
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

// The offset of chunk ^ `more`, given the offset of `chunk`: if `more` is known at compile time, it costs no
// register.
__device__ __forceinline__ int offset_further(int offset, int more) {
  return (offset ^ more % 8 * 16) + more / 8 * 128;
}

}  // namespace pxc::cuda
