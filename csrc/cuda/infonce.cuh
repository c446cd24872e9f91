// Blockwise InfoNCE on tensor cores, eq. (1) to (6) of backends/reference.py. The anchors x keys matrix is
// never stored.
//
// One engine serves every pass. A block keeps a tile of rows in shared memory and walks over tiles of
// columns, which cp.async brings one tile ahead. Of each it computes the scores S = rows . columns^T, turns
// them into weights P, and adds P . columns to its output: one tile in shared memory serves both products.
//
//   pass        rows      columns           weights                    output
//   negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
//   positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
//   backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
//   symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)
//
// A warp computes S for its rows and a share of the columns, and the output for the same rows and a share of
// the channels. In between, the weights pass through shared memory to the warps of the same rows, and only
// those wait for each other; the whole block meets once a tile.
//
// Rows and columns come in the order of their class where that is known. Most tiles of pass 1 then hold no
// positive of their block and take a path without masks; in pass 2 a tile of rows begins anew with every
// class, and meets the keys of that class alone, if the keys are grouped. Several blocks share the walk of
// one row tile, each with a partial result of its own, and a second stage combines those in a fixed order:
// nothing is atomic, and a repeat gives the same bits.
//
// Rows of fp32 are split into fp16 numbers and what those leave of them, which are laid behind one another
// like rows of twice the length; three products of such planes keep fp32's accuracy, and one has that of
// TF32.
//
// Scores are in units of log2: scale = log2(e) / temperature, applied to the fp32 sum.
#pragma once

#include <type_traits>

#include "sort.cuh"

namespace pxc::cuda {

constexpr float kLog2E = 1.442695040888963407f;
constexpr float kLn2 = 0.693147180559945309f;

// A shift that lags behind the maximum by up to this much spares most tiles the rescaling of the output.
constexpr float kSlack = 8.f;

enum class Pass { kNegatives, kPositives, kBackward };

// --- what depends on the element type ---

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

// --- rows and columns in device memory ---

struct Side {
  const unsigned char* rows;  // [count, row_bytes]
  const int32_t* labels;      // [count], in the order of visits
  const int32_t* order;       // [count] row of each visit, or null: as they lie
  int count, row_bytes;
};

struct LabelRange {
  int low, high;  // high < 0: no label at all; low < 0: some have none

  __device__ __forceinline__ bool apart(LabelRange other) const {
    return high < other.low || other.high < low;
  }
  __device__ __forceinline__ bool one_class() const { return low == high; }
};

// Of the labels at or above 0 among `count` places of a side from `first`; the whole warp calls it.
__device__ __forceinline__ LabelRange range_of_labelled(const Side& side, int64_t first, int count,
                                                        int lane) {
  LabelRange range{INT32_MAX, -1};
  for (int i = lane; i < count; i += kWarp) {
    const int label = first + i < side.count ? side.labels[first + i] : -1;
    if (label >= 0) range = {min(range.low, label), max(range.high, label)};
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    range.low = min(range.low, shuffle_xor(range.low, lanes));
    range.high = max(range.high, shuffle_xor(range.high, lanes));
  }
  return range;
}

struct Visit {
  int tile;
  bool mixed;       // it may hold a positive of the block, or a column without a label
  bool unlabelled;  // it does hold such a column, or ends behind the last
};

// The column tiles of one split that matter to a block: every `splits`-th, so that tiles of one class spread
// over all splits. A warp looks at 32 of them at a time; all warps see the same.
template <Pass kPass, class Tile>
class Walk {
 public:
  __device__ __forceinline__ Walk(const int32_t* ranges, int64_t num_columns, LabelRange own, int split,
                                  int splits, int lane)
      : ranges_(reinterpret_cast<const int2*>(ranges)),
        num_ranges_(int((num_columns + Tile::S::kColumns - 1) / Tile::S::kColumns)),
        base_(split),
        splits_(splits),
        own_(own),
        lane_(lane) {}

  // The next tile; its index is -1 behind the last.
  __device__ __forceinline__ Visit next() {
    while (visit_ == 0) {
      if (own_.high < 0 || base_ * Tile::kPieces >= num_ranges_) return {-1, false, false};
      const int tile = base_ + lane_ * splits_;
      LabelRange range = range_of(tile * Tile::kPieces);
#pragma unroll
      for (int piece = 1; piece < Tile::kPieces; ++piece) {
        const LabelRange other = range_of(tile * Tile::kPieces + piece);
        range = {min(range.low, other.low), max(range.high, other.high)};
      }
      visit_ = ballot(concerns(range));
      mixed_ = ballot(range.low < 0 || !range.apart(own_));
      unlabelled_ = ballot(range.low < 0);
      base_ += kWarp * splits_;
    }
    const int bit = lowest_bit(visit_);
    visit_ &= visit_ - 1;
    return {base_ - (kWarp - bit) * splits_, bool(mixed_ >> bit & 1), bool(unlabelled_ >> bit & 1)};
  }

 private:
  __device__ __forceinline__ LabelRange range_of(int piece) const {
    if (piece >= num_ranges_) return {-1, -1};
    return {ranges_[piece].x, ranges_[piece].y};
  }

  __device__ __forceinline__ bool concerns(LabelRange range) const {
    if (range.high < 0) return false;
    if (kPass == Pass::kPositives) return !LabelRange{max(range.low, 0), range.high}.apart(own_);
    if (kPass == Pass::kBackward) return true;
    return !(range.one_class() && own_.one_class() && range.low == own_.low);  // all of it positive
  }

  const int2* ranges_;
  int num_ranges_, base_, splits_;  // base_: the first tile that has not been looked at
  LabelRange own_;
  int lane_;
  unsigned visit_ = 0, mixed_ = 0, unlabelled_ = 0;
};

// --- the engine ---

// Loops over a thread's registers, unrolled: an index known only at run time would move them to local memory.
template <class Tile, class Visit>
__device__ __forceinline__ void each_row(Visit visit) {
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) visit(f, half);
  }
}
template <class Tile, class Visit>
__device__ __forceinline__ void each_score(Visit visit) {  // columns within a row
#pragma unroll
  for (int n = 0; n < Tile::kScoreCols; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) visit(n, e);
  }
}
template <class Tile, class Visit>
__device__ __forceinline__ void each_output(Visit visit) {
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
    for (int n = 0; n < Tile::kOutputCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(f, n, i);
    }
  }
}

// Places in fragments, as the PTX manual lays them out: of a 16 x 8 piece of sums, the four of a thread are
// at rows `group` and `group` + 8, columns 2 `quad` and the next.
template <class Tile, int kWeightParts = Tile::kWeightParts>
struct Engine {
  using T = typename Tile::T;
  using Scores = float[Tile::kFragments][Tile::kScoreCols][4];
  using Output = float[Tile::kFragments][Tile::kOutputCols][4];
  using PerRow = float[Tile::kFragments][2];
  static constexpr int kWeightBytes = Tile::kBlockA * Tile::kBlockK * int(sizeof(T));  // of one part

  Side rows, columns;
  int first_row;  // of the block
  int lane, group, quad, row_warp, col_warp;
  unsigned char *row_tile, *column_tiles;
  unsigned char* weights;  // [kWeightParts, kBlockA, kBlockK]
  float* exchange;         // [kColWarps, kBlockA]

  __device__ __forceinline__ Engine(SharedMemory& memory, const Side& rows, const Side& columns,
                                    int first_row)
      : rows(rows), columns(columns), first_row(first_row) {
    lane = int(threadIdx.x) % kWarp;
    group = lane / 4;
    quad = lane % 4;
    row_warp = int(threadIdx.x) / kWarp / Tile::kColWarps;
    col_warp = int(threadIdx.x) / kWarp % Tile::kColWarps;
    row_tile = memory.template take<unsigned char>(size_t(Tile::kBlockA) * row_stride());
    column_tiles = memory.template take<unsigned char>(size_t(2 * Tile::kBlockK) * row_stride());
    weights = memory.template take<unsigned char>(kWeightParts * kWeightBytes);
    exchange = memory.template take<float>(Tile::kColWarps * Tile::kBlockA);
  }

  // Of a row in device memory and in shared memory.
  __device__ __forceinline__ int row_bytes() const {
    return Tile::kFull ? Tile::kMaxRowBytes : rows.row_bytes;
  }
  __device__ __forceinline__ int row_stride() const { return (row_bytes() + 127) / 128 * 128; }
  __device__ __forceinline__ int plane_stride() const { return row_stride() / Tile::kPlanes; }

  // Within the block's tile, row `half` of 2 of fragment `f`.
  __device__ __forceinline__ int local_row(int f, int half) const {
    return (row_warp * Tile::kFragments + f) * 16 + half * 8 + group;
  }
  // Within a tile of columns, the first of the two of piece `n` of the scores.
  __device__ __forceinline__ int local_column(int n) const {
    return (col_warp * Tile::kScoreCols + n) * 8 + quad * 2;
  }
  // Channel of piece `n` of the output: warps take turns by 16, so that any number of channels is shared.
  __device__ __forceinline__ int channel(int n) const {
    return (n / 2 * Tile::kColWarps + col_warp) * 16 + n % 2 * 8;
  }

  __device__ __forceinline__ int label(const Side& side, int64_t place) const {
    return place < side.count ? side.labels[place] : -1;
  }

  // Starts copying kCount rows of a side. What has no label becomes 0, whatever it holds (0 * NaN is NaN).
  template <int kCount>
  __device__ __forceinline__ void load(unsigned char* tile, const Side& side, int64_t first,
                                       bool check_labels) const {
    const int padded = row_stride() / 16;
    for (int row = int(threadIdx.x) / 8; row < kCount; row += Tile::kThreads / 8) {
      const bool wanted = !check_labels || label(side, first + row) >= 0;
      const int64_t source = !wanted ? 0 : side.order == nullptr ? first + row : side.order[first + row];
      const unsigned char* from = side.rows + source * row_bytes();
      for (int chunk = int(threadIdx.x) % 8; chunk < padded; chunk += 8) {
        unsigned char* to = tile + tile_offset(row, chunk, row_stride());
        if (Tile::kFull || row_bytes() % 16 == 0) {
          const bool inside = wanted && chunk < row_bytes() / 16;
          cp_async_16(to, inside ? from + chunk * 16 : side.rows, inside ? 16 : 0);
        } else {
          for (int byte = 0; byte < 16; byte += 4) {
            const bool inside = wanted && chunk * 16 + byte < row_bytes();
            cp_async_4(to + byte, inside ? from + chunk * 16 + byte : side.rows, inside ? 4 : 0);
          }
        }
      }
    }
  }

  // The same of columns that lie in the order of visits and all have labels, as long as the tile takes.
  __device__ __forceinline__ void load_whole_columns(unsigned char* tile, int64_t first) const {
    constexpr int kRowsAtATime = Tile::kThreads / 8;
    static_assert(kRowsAtATime % 8 == 0, "rows that far apart are swizzled alike");
    const int row = int(threadIdx.x) / 8, chunk = int(threadIdx.x) % 8;
    const unsigned char* from = columns.rows + (first + row) * Tile::kMaxRowBytes + chunk * 16;
    unsigned char* to = tile + tile_offset(row, chunk, Tile::kMaxRowBytes);
#pragma unroll
    for (int further = 0; further < Tile::kBlockK; further += kRowsAtATime) {
#pragma unroll
      for (int byte = 0; byte < Tile::kMaxRowBytes; byte += 128) {
        const int offset = further * Tile::kMaxRowBytes + byte;
        cp_async_16(to + offset, from + offset, 16);
      }
    }
  }

  __device__ __forceinline__ unsigned char* column_tile(int stage) const {
    return column_tiles + stage * Tile::kBlockK * row_stride();
  }

  // Visits the tiles of a walk: weigh(stage, mixed, first column) for each, with the tile in shared memory.
  // load_extra(stage, first column) starts the copies that go with a tile.
  template <class Walk, class LoadExtra, class Weigh>
  __device__ __forceinline__ void run(Walk& walk, LoadExtra load_extra, Weigh weigh) const {
    Visit visit = walk.next();
    if (visit.tile < 0) return;
    const auto start = [&](int stage, const Visit& visit) {
      const int64_t first = int64_t(visit.tile) * Tile::kBlockK;
      if (Tile::kFull && !visit.unlabelled && columns.order == nullptr) {
        load_whole_columns(column_tile(stage), first);
      } else {
        load<Tile::kBlockK>(column_tile(stage), columns, first, visit.unlabelled);
      }
      load_extra(stage, first);
      cp_async_commit();
    };
    load<Tile::kBlockA>(row_tile, rows, first_row, true);
    start(0, visit);
    for (int stage = 0; visit.tile >= 0; stage ^= 1) {
      cp_async_wait<0>();
      sync_block();  // all copies are visible to all, and nobody reads the other stage any more
      const Visit next = walk.next();
      if (next.tile >= 0) start(stage ^ 1, next);
      weigh(stage, visit.mixed, unsigned(visit.tile) * Tile::kBlockK);
      visit = next;
    }
    sync_block();  // shared memory may be used for something else
  }

  // Fragments of kSteps steps of 16 channels.
  template <int kSteps>
  struct Fragments {
    uint32_t rows[kSteps][Tile::kPlanes][Tile::kFragments][4];
    uint32_t columns[kSteps][Tile::kPlanes][Tile::kScoreCols][2];
  };

  // S of the warp: its rows times its columns, over all channels. A step of the tensor cores takes 16
  // channels, which are two chunks.
  template <int kUnroll>
  __device__ __forceinline__ void multiply_rows(Scores& scores, int stage) const {
    if constexpr (Tile::kFull && Tile::kPlanes == 1 && Tile::kFragments > 2) {
      multiply_many_rows(scores, stage);
    } else {
      multiply_some_rows<kUnroll>(scores, stage);
    }
  }

  // Of whole rows, more of them than the registers can hold for two steps: of the columns the next step is on
  // the way, of the rows the next two fragments.
  __device__ __forceinline__ void multiply_many_rows(Scores& scores, int stage) const {
    constexpr int kFragments = Tile::kFragments, kAll = Tile::kMaxRowBytes / 32, kAhead = 2;
    static_assert(Tile::kScoreCols % 2 == 0, "four matrices at a time are two pieces of the columns");
    const unsigned char* own_rows = row_tile + row_warp * kFragments * 16 * row_stride();
    const unsigned char* own_columns = column_tile(stage) + col_warp * Tile::kScoreCols * 8 * row_stride();
    const int row_offset = tile_offset(lane % 16, lane / 16, row_stride());
    const int column_offset = tile_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2, row_stride());
    uint32_t of_rows[kAhead + 1][4], of_columns[2][Tile::kScoreCols / 2][4];
    const auto fetch_rows = [&](int number) {
      const int step = number / kFragments, f = number % kFragments;
      ldmatrix_x4(of_rows[number % (kAhead + 1)],
                  own_rows + f * 16 * row_stride() + offset_further(row_offset, 2 * step));
    };
    const auto fetch_columns = [&](int step) {
#pragma unroll
      for (int n = 0; n < Tile::kScoreCols; n += 2) {
        ldmatrix_x4(of_columns[step % 2][n / 2],
                    own_columns + n * 8 * row_stride() + offset_further(column_offset, 2 * step));
      }
    };
    each_row<Tile>(
        [&](int f, int half) { each_score<Tile>([&](int n, int e) { scores[f][n][2 * half + e] = 0.f; }); });
    fetch_columns(0);
#pragma unroll
    for (int number = 0; number < kAhead; ++number) fetch_rows(number);
#pragma unroll
    for (int number = 0; number < kAll * kFragments; ++number) {
      const int step = number / kFragments, f = number % kFragments;
      if (f == 0 && step + 1 < kAll) fetch_columns(step + 1);
      if (number + kAhead < kAll * kFragments) fetch_rows(number + kAhead);
#pragma unroll
      for (int n = 0; n < Tile::kScoreCols; ++n) {
        const uint32_t (&b)[4] = of_columns[step % 2][n / 2];
        mma<T>(scores[f][n], of_rows[number % (kAhead + 1)], b[n % 2 * 2], b[n % 2 * 2 + 1]);
      }
    }
  }

  // Tensor cores cut off what does not fit their sum, fp32 additions round: of two planes, the products of
  // the high ones are added up outside of them, and the small ones by themselves.
  template <int kUnroll>
  __device__ __forceinline__ void multiply_some_rows(Scores& scores, int stage) const {
    // Four matrices at a time: of two pieces of the columns in one step, or of one piece in two.
    constexpr bool kPairs = Tile::kScoreCols % 2 == 0;
    constexpr int kSteps = kPairs ? 1 : 2;
    constexpr int kPlanes = Tile::kPlanes;
    const int row = row_warp * Tile::kFragments * 16 + lane % 16;
    const int column = col_warp * Tile::kScoreCols * 8 + lane % 8 + (kPairs ? lane / 16 * 8 : 0);
    const unsigned char* own_columns = column_tile(stage);
    const int column_offset = tile_offset(column, kPairs ? lane / 8 % 2 : lane / 8, row_stride());
    const int row_offset = tile_offset(row, lane / 16, row_stride());
    const auto fetch = [&](Fragments<kSteps>& to, int byte, int chunk) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane, byte += plane_stride()) {
#pragma unroll
        for (int n = 0; n < Tile::kScoreCols; n += kPairs ? 2 : 1) {
          uint32_t bits[4];
          ldmatrix_x4(bits, own_columns + byte + n * 8 * row_stride() + offset_further(column_offset, chunk));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            to.columns[kPairs ? 0 : i / 2][plane][n + (kPairs ? i / 2 : 0)][i % 2] = bits[i];
          }
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int f = 0; f < Tile::kFragments; ++f) {
            ldmatrix_x4(to.rows[step][plane][f], row_tile + byte + f * 16 * row_stride() +
                                                     offset_further(row_offset, chunk + 2 * step));
          }
        }
      }
    };
    const auto zero = [](Scores& sums) {
      each_row<Tile>(
          [&](int f, int half) { each_score<Tile>([&](int n, int e) { sums[f][n][2 * half + e] = 0.f; }); });
    };
    // A single sum would make every product wait for the one before: one score takes turns with another.
    constexpr bool kTwoSums = kPlanes == 2 || Tile::kFragments * Tile::kScoreCols == 1;
    Scores others;
    zero(scores);
    if (kTwoSums) zero(others);
    const auto multiply = [&](const Fragments<kSteps>& of) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
          for (int n = 0; n < Tile::kScoreCols; ++n) {
            const auto product = [&](float (&sum)[4], int of_rows, int of_columns) {
              const uint32_t (&b)[2] = of.columns[step][of_columns][n];
              mma<T>(sum, of.rows[step][of_rows][f], b[0], b[1]);
            };
            if constexpr (kPlanes == 1) {
              product(kTwoSums && step == 1 ? others[f][n] : scores[f][n], 0, 0);
            } else {
              float high[4] = {};
              product(high, 0, 0);
#pragma unroll
              for (int i = 0; i < 4; ++i) scores[f][n][i] += high[i];
              product(others[f][n], 1, 0);
              product(others[f][n], 0, 1);
            }
          }
        }
      }
    };
    if constexpr (Tile::kFull && kPairs) {
      // The fragments of the next step are on the way while this one's are multiplied. Of two planes, more
      // would be on the way at once than there are registers, if the whole loop were unrolled.
      constexpr int kAll = Tile::kMaxRowBytes / kPlanes / 32, kUnrolled = kPlanes == 2 ? 4 : kAll;
      Fragments<kSteps> fragments[2];
      fetch(fragments[0], 0, 0);
#pragma unroll kUnrolled
      for (int step = 0; step < kAll; ++step) {
        if (step + 1 < kAll) fetch(fragments[(step + 1) % 2], (step + 1) / 4 * 128, (step + 1) % 4 * 2);
        multiply(fragments[step % 2]);
      }
    } else {
#pragma unroll 1
      for (int byte = 0; byte < plane_stride(); byte += 128) {
#pragma unroll kUnroll
        for (int chunk = 0; chunk < 8; chunk += 2 * kSteps) {
          Fragments<kSteps> fragments;
          fetch(fragments, byte, chunk);
          multiply(fragments);
        }
      }
    }
    if (!kTwoSums) return;
    each_row<Tile>([&](int f, int half) {
      each_score<Tile>([&](int n, int e) { scores[f][n][2 * half + e] += others[f][n][2 * half + e]; });
    });
  }

  // The byte at which a chunk of the weights begins, of one part.
  static constexpr int kWeightStride = Tile::kBlockK * int(sizeof(T));  // bytes of a row
  __device__ __forceinline__ static int weight_offset(int row, int chunk) {
    constexpr int kChunks = kWeightStride / 16;
    return row * kWeightStride + swizzled<kChunks>(row, chunk) * 16;
  }

  // Hands the warp's weights to the warps of the same rows, in `kParts` parts that add up to them.
  template <int kParts>
  __device__ __forceinline__ void store_weights(const Scores& scores) const {
    const int offset = weight_offset(local_row(0, 0), col_warp * Tile::kScoreCols) + quad * 4;
    each_row<Tile>([&](int f, int half) {
#pragma unroll
      for (int n = 0; n < Tile::kScoreCols; ++n) {  // a piece is a chunk
        unsigned char* place = weights + offset_further(offset, n) + (f * 16 + half * 8) * kWeightStride;
        float first = scores[f][n][2 * half], second = scores[f][n][2 * half + 1];
#pragma unroll
        for (int part = 0; part < kParts; ++part, place += kWeightBytes) {
          *reinterpret_cast<uint32_t*>(place) = pack<T>(first, second);
          first -= to_float(from_float<T>(first));
          second -= to_float(from_float<T>(second));
        }
      }
    });
    sync_row_warps();  // the weights of all columns are there
  }

  // Constant ids, or a kernel counts as one that uses all 16 barriers of a block.
  __device__ __forceinline__ void sync_row_warps() const {
    static_assert(Tile::kRowWarps <= 2, "an id for each");
    if (Tile::kRowWarps == 1 || row_warp == 0) {
      sync_group(1, Tile::kColWarps * kWarp);
    } else {
      sync_group(2, Tile::kColWarps * kWarp);
    }
  }

  // output += weights . columns, for the warp's rows and its share of the channels. Rows as long as the tile
  // takes are spared the question of every 16 channels whether there are any: it keeps the compiler from
  // loading ahead.
  template <int kParts>
  __device__ __forceinline__ void accumulate(Output& output, int stage) const {
    const bool whole = row_stride() == Tile::kMaxRowBytes;
    if constexpr (Tile::kPlanes == 2) {
#pragma unroll 1
      for (int step = 0; step < kWeightSteps; step += kStepsOfPlanes) {
        if (whole) {
          accumulate_planes<true>(output, stage, step);
        } else {
          accumulate_planes<false>(output, stage, step);
        }
      }
    } else if (whole) {
      accumulate_parts<kParts, true>(output, stage);
    } else {
      accumulate_parts<kParts, false>(output, stage);
    }
  }

  static constexpr int kWeightSteps = Tile::kBlockK / 16;                     // of the tensor cores
  static constexpr int kStepsOfPlanes = kWeightSteps < 2 ? kWeightSteps : 2;  // that are summed apart

  __device__ __forceinline__ void load_weights(uint32_t (&a)[4], int f, int step, int part) const {
    const int offset = weight_offset(row_warp * Tile::kFragments * 16 + lane % 16, lane / 16);
    ldmatrix_x4(a, weights + offset_further(offset, 2 * step) + f * 16 * kWeightStride + part * kWeightBytes);
  }

  // Columns of a step by 16 channels: those of pieces n and n + 1 of the output.
  __device__ __forceinline__ void load_columns(uint32_t (&b)[4], int stage, int step, int plane,
                                               int n) const {
    const unsigned char* tile = column_tile(stage) + step * 16 * row_stride() + plane * plane_stride();
    const int offset = tile_offset(lane % 16, 2 * col_warp + lane / 16, row_stride());
    ldmatrix_x4_trans(b, tile + offset_further(offset, n / 2 * Tile::kColWarps * 2));
  }

  // Columns are read once for both parts of the weights.
  template <int kParts, bool kWhole>
  __device__ __forceinline__ void accumulate_parts(Output& output, int stage) const {
#pragma unroll
    for (int step = 0; step < kWeightSteps; ++step) {
      uint32_t a[kParts][Tile::kFragments][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) load_weights(a[part][f], f, step, part);
      }
#pragma unroll
      for (int n = 0; n < Tile::kOutputCols; n += 2) {
        if (!kWhole && 2 * channel(n) >= row_stride()) continue;
        uint32_t b[4];
        load_columns(b, stage, step, 0, n);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int f = 0; f < Tile::kFragments; ++f) {
            mma<T>(output[f][n], a[part][f], b[0], b[1]);
            mma<T>(output[f][n + 1], a[part][f], b[2], b[3]);
          }
        }
      }
    }
  }

  // The same of two parts and two planes for a step or two, summed apart: the sum is rounded when it is
  // added.
  template <bool kWhole>
  __device__ __forceinline__ void accumulate_planes(Output& output, int stage, int first_step) const {
    uint32_t a[kStepsOfPlanes][2][Tile::kFragments][4];
#pragma unroll
    for (int step = 0; step < kStepsOfPlanes; ++step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) load_weights(a[step][part][f], f, first_step + step, part);
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::kOutputCols; n += 2) {
      if (!kWhole && 2 * channel(n) >= plane_stride()) continue;
      float sums[Tile::kFragments][2][4] = {};
#pragma unroll
      for (int step = 0; step < kStepsOfPlanes; ++step) {
        uint32_t b[2][4];
#pragma unroll
        for (int plane = 0; plane < 2; ++plane) load_columns(b[plane], stage, first_step + step, plane, n);
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
          for (int piece = 0; piece < 2; ++piece) {
            mma<T>(sums[f][piece], a[step][1][f], b[0][2 * piece], b[0][2 * piece + 1]);
            mma<T>(sums[f][piece], a[step][0][f], b[1][2 * piece], b[1][2 * piece + 1]);
            mma<T>(sums[f][piece], a[step][0][f], b[0][2 * piece], b[0][2 * piece + 1]);
          }
        }
      }
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) output[f][n + i / 4][i % 4] += sums[f][i / 4][i % 4];
      }
    }
  }

  // Sums a value of each row over the threads that share it; thread `row` of the block gets that row's. All
  // call it.
  template <class Value>
  __device__ __forceinline__ Value sum_over_row(const Value (&values)[Tile::kFragments][2]) const {
    static_assert(sizeof(Value) == sizeof(float), "they share the exchange");
    Value* sums = reinterpret_cast<Value*>(exchange);
    each_row<Tile>([&](int f, int half) {
      Value sum = values[f][half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (quad == 0) sums[col_warp * Tile::kBlockA + local_row(f, half)] = sum;
    });
    sync_block();  // every warp's sums are there
    Value sum = 0;
    if (int(threadIdx.x) < Tile::kBlockA) {
      for (int warp = 0; warp < Tile::kColWarps; ++warp) sum += sums[warp * Tile::kBlockA + int(threadIdx.x)];
    }
    sync_block();  // before the next sum overwrites them
    return sum;
  }

  // Writes output [rows, stride], as far as there are rows and channels; row i goes to places[i] (null: to
  // i).
  __device__ __forceinline__ void write(const Output& output, float* to, const int32_t* places,
                                        int64_t stride, int64_t num_channels) const {
    each_row<Tile>([&](int f, int half) {
      const int64_t row = int64_t(first_row) + local_row(f, half);
      if (row >= rows.count) return;
      float* line = to + (places == nullptr ? row : places[row]) * stride;
#pragma unroll
      for (int n = 0; n < Tile::kOutputCols; ++n) {
        const int64_t first = channel(n) + 2 * quad;
        if (first + 1 < num_channels && stride % 2 == 0) {
          *reinterpret_cast<float2*>(line + first) =
              make_float2(output[f][n][2 * half], output[f][n][2 * half + 1]);
        } else {
          if (first < num_channels) line[first] = output[f][n][2 * half];
          if (first + 1 < num_channels) line[first + 1] = output[f][n][2 * half + 1];
        }
      }
    });
  }
};

// --- the rows of both sides ---

template <class Tile>
__device__ __forceinline__ Side anchors_of(const InfonceRows& p) {
  return {
      .rows = static_cast<const unsigned char*>(p.anchors),
      .labels = p.sorted_labels,
      .order = p.order,
      .count = int(p.num_anchors),
      .row_bytes = int(p.channels) * 2 * Tile::kPlanes,
  };
}

// The keys of either pass: null where the anchors are the keys.
template <class Tile, class Params>
__device__ __forceinline__ Side keys_of(const Params& p) {
  if (p.keys == nullptr) return anchors_of<Tile>(p);
  return {
      .rows = static_cast<const unsigned char*>(p.keys),
      .labels = p.key_labels,
      .order = nullptr,
      .count = int(p.num_keys),
      .row_bytes = int(p.channels) * 2 * Tile::kPlanes,
  };
}

// --- planes of fp32 rows ---

// Planes are fp16 numbers: rows times a power of two that all rows of a side share. It is 2^8 for a side
// whose largest number is in [2^-8, 2^7), as that of rows of length 1 is, and takes the largest to [2^14,
// 2^15) otherwise. Of what is below 2^-25 in these units nothing is left.
constexpr int kUsualExponent = 8, kSmallestUsual = -8, kPlaneThreads = 256, kPlaneChannels = 8;

// Times which numbers of at most `peak` become fp16 ones, as an exponent of two.
__device__ __forceinline__ int plane_exponent(float peak) {
  const int exponent = int(float_bits(peak) >> 23) - 127;
  if (peak == 0.f || (exponent >= kSmallestUsual && exponent < 15 - kUsualExponent)) return kUsualExponent;
  return min(14 - exponent, 126);
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}

// What the planes' products are to be multiplied by.
template <class Params>
__device__ __forceinline__ float unscale_of_keys(const Params& p) {
  return p.unscale == nullptr ? 1.f : p.unscale[p.keys == nullptr ? 0 : 1];
}

// A warp per row: of the anchors in blocks with y 0, of the keys in those with y 1. The first launch takes
// the usual power of two, and leaves each block's largest finite number of a labelled row; the second mends
// what that does not fit.
template <int kPlanes, class Params>
__global__ void __launch_bounds__(kPlaneThreads) infonce_planes_kernel(Params p, bool again) {
  constexpr int kWarps = kPlaneThreads / kWarp;
  SharedMemory memory;
  float* warps = memory.take<float>(kWarps);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const bool of_keys = blockIdx.y == 1;
  const float* rows = static_cast<const float*>(of_keys ? p.keys : p.anchors);
  const int32_t* labels = of_keys ? p.key_labels : p.anchor_labels;
  Half* planes = static_cast<Half*>(of_keys ? p.key_planes : p.anchor_planes);
  const int64_t count = of_keys ? p.num_keys : p.num_anchors;
  float* peaks = p.peaks + int64_t(blockIdx.y) * gridDim.x;
  const auto largest_of_block = [&](float value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
    if (lane == 0) warps[warp] = value;
    sync_block();  // those of all warps are there
    for (int other = 0; other < kWarps; ++other) value = fmaxf(value, warps[other]);
    return value;
  };

  int exponent = kUsualExponent;
  float peak = 0.f;
  if (again) {
    for (int block = int(threadIdx.x); block < int(gridDim.x); block += kPlaneThreads) {
      peak = fmaxf(peak, peaks[block]);
    }
    exponent = plane_exponent(largest_of_block(peak));
    if (blockIdx.x == 0 && threadIdx.x == 0) p.unscale[blockIdx.y] = power_of_two(-exponent);
    if (exponent == kUsualExponent) return;
  }
  const float scale = power_of_two(exponent);
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < count; row += int64_t(gridDim.x) * kWarps) {
    const float* from = rows + row * p.grad_channels;
    Half* to = planes + row * kPlanes * p.channels;
    const bool labelled = labels[row] >= 0;
    for (int64_t first = lane * kPlaneChannels; first < p.channels; first += kWarp * kPlaneChannels) {
      float values[kPlaneChannels];
      if (p.grad_channels % 4 == 0 && reinterpret_cast<uint64_t>(rows) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kPlaneChannels; i += 4) {
          const float4 four = first + i < p.grad_channels ? *reinterpret_cast<const float4*>(from + first + i)
                                                          : make_float4(0.f, 0.f, 0.f, 0.f);
          values[i] = four.x;
          values[i + 1] = four.y;
          values[i + 2] = four.z;
          values[i + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPlaneChannels; ++i) {
          values[i] = first + i < p.grad_channels ? from[first + i] : 0.f;
        }
      }
      uint32_t words[kPlanes][kPlaneChannels / 2];
#pragma unroll
      for (int i = 0; i < kPlaneChannels; i += 2) {
        float low = values[i], high = values[i + 1];
        if (labelled && fabsf(low) < INFINITY) peak = fmaxf(peak, fabsf(low));
        if (labelled && fabsf(high) < INFINITY) peak = fmaxf(peak, fabsf(high));
        low *= scale;
        high *= scale;
        words[0][i / 2] = pack<Half>(low, high);
        if constexpr (kPlanes == 2) {  // nothing is left of what is not finite
          low -= to_float(from_float<Half>(low));
          high -= to_float(from_float<Half>(high));
          words[1][i / 2] =
              pack<Half>(fabsf(low) < INFINITY ? low : 0.f, fabsf(high) < INFINITY ? high : 0.f);
        }
      }
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        *reinterpret_cast<uint4*>(to + plane * p.channels + first) =
            make_uint4(words[plane][0], words[plane][1], words[plane][2], words[plane][3]);
      }
    }
  }
  if (again) return;
  peak = largest_of_block(peak);
  if (threadIdx.x == 0) peaks[blockIdx.x] = peak;
}

// --- the order of visits ---

constexpr int kOrderThreads = kSortThreads;

// Smallest and largest label of every piece of the columns; places behind the last count as without a label.
// A block looks at kOrderThreads labels, and a warp at 32, which are one piece or several.
template <int kPiece>
__device__ __forceinline__ void find_ranges(const int32_t* labels, int64_t count, int32_t* ranges,
                                            int64_t block) {
  static_assert(kPiece <= kWarp, "a piece is read by one warp");
  const int64_t place = block * kOrderThreads + threadIdx.x;
  int low = place < count ? max(labels[place], -1) : -1, high = low;
  for (int lanes = kPiece / 2; lanes > 0; lanes /= 2) {
    low = min(low, shuffle_xor(low, lanes));
    high = max(high, shuffle_xor(high, lanes));
  }
  if (place % kPiece == 0 && place < count) {
    reinterpret_cast<int2*>(ranges)[place / kPiece] = make_int2(low, high);
  }
}

template <int kPiece>
__global__ void __launch_bounds__(kOrderThreads)
    infonce_label_ranges_kernel(const int32_t* labels, int64_t count, int32_t* ranges) {
  find_ranges<kPiece>(labels, count, ranges, blockIdx.x);
}

// Says that an anchor is visited as the `place`-th. For the backward also what eq. (5) needs of it.
template <class Params>
__device__ __forceinline__ void visit_anchor(const Params& p, int64_t place, int64_t anchor) {
  const int label = max(p.anchor_labels[anchor], -1);
  p.order[place] = int32_t(anchor);
  p.sorted_labels[place] = label;
  if constexpr (std::is_same_v<Params, InfonceBackwardParams>) {
    // Without negatives sigma is 0: a log-sum-exp of +inf and factors of 0 give that without a special case.
    const bool alone = label < 0 || p.neg_lse[anchor] == -INFINITY;
    const float factor = alone ? 0.f : p.grad_scale[anchor];
    reinterpret_cast<float4*>(p.coefficients)[place] =
        make_float4(alone ? INFINITY : p.neg_lse[anchor] * kLog2E,
                    alone ? 0.f : factor * p.pos_weight[anchor], factor, bits_float(uint32_t(label)));
  }
}

// Sorts the anchors by (label, index), those without a label last: all of them if they make one tile, else by
// tiles. The blocks behind find the ranges of the keys' labels. And the scale of the scores is worked out.
template <class Params, int kPiece>
__global__ void __launch_bounds__(kOrderThreads, 1) infonce_order_kernel(Params p) {
  const int64_t tiles = (p.num_anchors + kTileKeys - 1) / kTileKeys;
  if (blockIdx.x >= tiles) {
    return find_ranges<kPiece>(p.key_labels, p.num_keys, p.label_ranges, blockIdx.x - tiles);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const float scale = kLog2E / p.temperature;
    *p.score_scale = p.unscale == nullptr ? scale : scale * p.unscale[0] * unscale_of_keys(p);
  }
  SharedMemory memory;
  const auto rank_of_label = [&p](int64_t anchor) {
    const int label = p.anchor_labels[anchor];
    return label < 0 ? 0x80000000u : unsigned(label);
  };
  sort_numbers(memory, blockIdx.x, p.num_anchors, p.sort_keys, rank_of_label,
               [&p](int64_t place, uint64_t, int64_t anchor) { visit_anchor(p, place, anchor); });
}

// Puts the anchors of several tiles where they belong, a warp per anchor.
template <class Params>
__global__ void __launch_bounds__(kOrderThreads) infonce_rank_kernel(Params p, int64_t tiles) {
  const int64_t place = (int64_t(blockIdx.x) * kOrderThreads + threadIdx.x) / kWarp;
  if (place >= p.num_anchors) return;
  emit_ranked(p.sort_keys, tiles, place,
              [&p](int64_t rank, uint64_t, int64_t anchor) { visit_anchor(p, rank, anchor); });
}

// Of shared memory, in numbers; 128 bytes, as what follows is aligned to. What the warps leave there of one
// kind lies in whole 16 bytes of its own: a loop over the warps before is read in such pieces, and would read
// what others write.
constexpr int kClassTileScratch = 32, kTilesOfWarps = 8, kFoundTile = 16, kSpansOfWarps = 20;

// Whether columns come in the order of their classes, more or less: by how far the labels of a piece lie
// apart, on average over one piece for each thread. The whole block calls it.
template <int kThreads>
__device__ __forceinline__ bool are_grouped(const int32_t* ranges, int pieces, int* scratch) {
  constexpr int kMostApart = 4, kFar = 1 << 16;
  int apart = 0;
  if (pieces > 0) {
    const int2 range = reinterpret_cast<const int2*>(ranges)[int64_t(threadIdx.x) * pieces / kThreads];
    apart = range.y < 0 ? 0 : min(range.y - max(range.x, 0), kFar);
  }
  apart = warp_sum(apart);
  if (threadIdx.x % kWarp == 0) scratch[kSpansOfWarps + threadIdx.x / kWarp] = apart;
  sync_block();  // the spans of all warps are there
  int all = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) all += scratch[kSpansOfWarps + warp];
  return all <= kMostApart * kThreads;
}

// Anchors that follow each other in the order of visits.
struct ClassTile {
  int first, count;  // none: -1
};

// One of the tiles of up to kBlockA anchors that have labels, found in the sorted labels: the one that
// choose(how many there are) names, if there are as many. Of grouped keys, tiles begin anew with every class.
// The whole block calls it.
template <int kBlockA, int kThreads, class Choose>
__device__ __forceinline__ ClassTile find_class_tile(const int32_t* labels, int count, bool grouped,
                                                     int* scratch, Choose choose) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kTilesOfWarps, "they share the scratch");
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int share = (count + kThreads - 1) / kThreads;
  const int begin = min(int(threadIdx.x) * share, count), end = min(begin + share, count);
  const auto begins_class = [&](int i) { return i == 0 || (grouped && labels[i] != labels[i - 1]); };

  // Where the class begins that the labels before a thread's share end in.
  int start = 0;
  for (int i = begin; i < end; ++i) {
    if (begins_class(i)) start = i;
  }
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int before = shuffle_up(start, lanes);
    if (lane >= lanes) start = max(start, before);
  }
  if (lane == kWarp - 1) scratch[warp] = start;
  const int of_lane_before = shuffle_up(start, 1);
  start = lane == 0 ? 0 : of_lane_before;
  sync_block();  // the last beginnings of all warps are there
  for (int other = 0; other < warp; ++other) start = max(start, scratch[other]);

  // How many tiles begin in the shares before.
  const auto begins_tile = [&](int i) {
    if (begins_class(i)) start = i;
    return labels[i] >= 0 && (i - start) % kBlockA == 0;
  };
  const int start_of_share = start;
  int tiles = 0;
  for (int i = begin; i < end; ++i) tiles += begins_tile(i);
  int before = warp_scan(tiles);
  if (lane == kWarp - 1) scratch[kTilesOfWarps + warp] = before;
  before -= tiles;
  if (threadIdx.x == 0) scratch[kFoundTile] = -1;
  sync_block();  // the tiles of all warps are there
  int all = 0;
  for (int other = 0; other < kWarps; ++other) {
    if (other == warp) before += all;
    all += scratch[kTilesOfWarps + other];
  }
  const int tile = choose(all);
  if (before <= tile && tile < before + tiles) {
    start = start_of_share;
    for (int i = begin, number = before; i < end; ++i) {
      if (begins_tile(i) && number++ == tile) scratch[kFoundTile] = i;
    }
  }
  sync_block();  // the first anchor of the tile is there
  const int first = scratch[kFoundTile];
  if (first < 0) return {-1, 0};
  int length = 0;
#pragma unroll
  for (int row = 0; row < kBlockA; row += kWarp) {
    const int i = first + row + lane;
    const bool inside = row + lane < kBlockA && i < count;
    length += count_bits(ballot(inside && (grouped ? labels[i] == labels[first] : labels[i] >= 0)));
  }
  return {first, length};
}

// --- forward ---

// Starts copying the labels of a tile's columns to `labels`; of what lies behind the last, -1.
template <int kCount>
__device__ __forceinline__ void load_labels(int* labels, const Side& side, int64_t first) {
  if (int(threadIdx.x) >= kCount) return;
  if (first + threadIdx.x < side.count) {
    cp_async_4(labels + threadIdx.x, side.labels + first + threadIdx.x, 4);
  } else {
    labels[threadIdx.x] = -1;
  }
}

// Pass 1 over the negatives: eq. (1), and O, both as partial results of one split.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    infonce_fwd_negatives_kernel(InfonceForwardParams p) {
  using Engine = pxc::cuda::Engine<Tile, Tile::kNegativeParts>;
  SharedMemory memory;
  const Side anchors = anchors_of<Tile>(p), keys = keys_of<Tile>(p);
  const Engine engine(memory, anchors, keys, int(blockIdx.x) * Tile::kBlockA);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  const float scale = *p.score_scale;
  const bool with_grad = p.negative_parts != nullptr;

  typename Engine::PerRow shift, sum = {};
  each_row<Tile>([&](int f, int half) { shift[f][half] = -INFINITY; });
  typename Engine::Output output = {};

  const LabelRange own = range_of_labelled(anchors, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<Pass::kNegatives, Tile> walk(p.label_ranges, keys.count, own, int(blockIdx.y), int(gridDim.y),
                                    engine.lane);
  bool visited = false;
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool mixed, unsigned) {
        visited = true;
        typename Engine::Scores scores;
        engine.template multiply_rows<2 / Tile::kPlanes>(scores, stage);
        if (mixed) {
          each_row<Tile>([&](int f, int half) {
            const int row_label = engine.label(anchors, engine.first_row + engine.local_row(f, half));
            each_score<Tile>([&](int n, int e) {
              const int label = key_labels[stage * Tile::kBlockK + engine.local_column(n) + e];
              if (label < 0 || label == row_label) scores[f][n][2 * half + e] = -INFINITY;
            });
          });
        }

        // The largest score of each row, first among this warp's columns, then among all.
        each_row<Tile>([&](int f, int half) {
          float highest = -INFINITY;
          each_score<Tile>([&](int n, int e) { highest = fmaxf(highest, scores[f][n][2 * half + e]); });
          highest = fmaxf(highest, shuffle_xor(highest, 1));
          highest = fmaxf(highest, shuffle_xor(highest, 2));
          if (engine.quad == 0)
            engine.exchange[engine.col_warp * Tile::kBlockA + engine.local_row(f, half)] = highest;
        });
        engine.sync_row_warps();  // the maxima of all column warps are there

        bool moved = false;
        typename Engine::PerRow rescale;
        each_row<Tile>([&](int f, int half) {
          float highest = -INFINITY;
#pragma unroll
          for (int warp = 0; warp < Tile::kColWarps; ++warp) {
            highest = fmaxf(highest, engine.exchange[warp * Tile::kBlockA + engine.local_row(f, half)]);
          }
          highest *= scale;
          rescale[f][half] = 1.f;
          if (highest > shift[f][half] + kSlack) {
            rescale[f][half] = exp2_approx(shift[f][half] - highest);
            shift[f][half] = highest;
            sum[f][half] *= rescale[f][half];
            moved = true;
          }
          // A row that has met no negative yet has no shift: any will do, its weights are 0.
          const float base = shift[f][half] == -INFINITY ? 0.f : shift[f][half] - Tile::kWeightBias;
          float sum_of_tile = 0.f;
          each_score<Tile>([&](int n, int e) {
            float& score = scores[f][n][2 * half + e];
            score = exp2_approx(fmaf(score, scale, -base));
            sum_of_tile += score;
          });
          sum[f][half] += sum_of_tile;
        });
        if (!with_grad) return;
        if (ballot(moved) != 0) {
          each_output<Tile>([&](int f, int n, int i) { output[f][n][i] *= rescale[f][i / 2]; });
        }
        engine.template store_weights<Tile::kNegativeParts>(scores);
        engine.template accumulate<Tile::kNegativeParts>(output, stage);
      });

  const int64_t part = int64_t(blockIdx.y) * p.num_anchors + engine.first_row;
  const float total = engine.sum_over_row(sum);
  const int rows_left = min(anchors.count - engine.first_row, Tile::kBlockA);
  if (int(threadIdx.x) < rows_left) p.sum_parts[part + threadIdx.x] = total;
  if (engine.quad == 0 && engine.col_warp == 0) {
    each_row<Tile>([&](int f, int half) {
      const int row = engine.local_row(f, half);
      if (row < rows_left) p.shift_parts[part + row] = shift[f][half];
    });
  }
  if (with_grad && visited) {  // else every shift is -inf, and nobody reads the output
    float* to = p.negative_parts + int64_t(blockIdx.y) * p.num_anchors * p.part_channels;
    engine.write(output, to, nullptr, p.part_channels, p.part_channels);
  }
}

// The splits of an anchor's negatives combined, in their order: the shift, the sum of exp2(score - shift).
struct Negatives {
  float shift, sum;

  // Eq. (1) in units of log2; without negatives the sum is 0, and this -inf.
  __device__ __forceinline__ float lse(float weight_bias) const { return shift + log2f(sum) - weight_bias; }
};

__device__ __forceinline__ Negatives combine_negatives(const InfonceForwardParams& p, int64_t row) {
  Negatives all{-INFINITY, 0.f};
#pragma unroll 8
  for (int64_t split = 0; split < p.splits; ++split) {
    all.shift = fmaxf(all.shift, p.shift_parts[split * p.num_anchors + row]);
  }
#pragma unroll 8
  for (int64_t split = 0; split < p.splits; ++split) {
    const float shift = p.shift_parts[split * p.num_anchors + row];
    const float sum = p.sum_parts[split * p.num_anchors + row];
    // A maximum passes over NaN: a part without a shift has met no negative, or NaN only, as its sum tells.
    all.sum += shift == -INFINITY ? sum : sum * exp2_approx(shift - all.shift);
  }
  return all;
}

// An anchor of a block: the label of its positives, the key that is the anchor itself (-1: none), eq. (1),
// and what is one for all, but spares a register here.
struct alignas(16) RowOfPositives {
  int label, excluded;
  float neg_lse, scale;
};

// What a block of pass 2 is about: a tile of anchors, and one of the splits of its walk.
struct PositivesItem {
  int number, split, splits;
};

// Pass 2 over anchors of a class or several and the keys of those, knowing eq. (1): eq. (2) to (4), and G.
template <class Tile>
__device__ __forceinline__ void add_positives(const InfonceForwardParams& p, const ClassTile& tile,
                                              const PositivesItem& item, SharedMemory& memory) {
  Side anchors = anchors_of<Tile>(p);
  anchors.count = tile.first + tile.count;
  const Side keys = keys_of<Tile>(p);
  const Engine<Tile> engine(memory, anchors, keys, tile.first);
  int* key_labels = memory.take<int>(2 * Tile::kBlockK);
  RowOfPositives* own_rows = memory.take<RowOfPositives>(Tile::kBlockA);
  const bool with_grad = p.positive_parts != nullptr;
  if (int(threadIdx.x) < Tile::kBlockA) {  // the engine's first barrier shows them to all
    const int64_t row = engine.first_row + threadIdx.x;
    const int label = engine.label(anchors, row);
    int excluded = -1;
    if (p.exclude_self && label >= 0) excluded = p.keys == nullptr ? int(row) : p.order[row];
    const float neg_lse = row < anchors.count ? combine_negatives(p, row).lse(Tile::kWeightBias) : 0.f;
    own_rows[threadIdx.x] = {
        .label = label < 0 ? INT32_MIN : label,
        .excluded = excluded,
        .neg_lse = neg_lse,
        .scale = *p.score_scale,
    };
  }

  typename Engine<Tile>::PerRow loss = {}, pos_weight = {};
  int count[Tile::kFragments][2] = {};
  typename Engine<Tile>::Output output = {};

  const LabelRange own{anchors.labels[tile.first], anchors.labels[anchors.count - 1]};
  Walk<Pass::kPositives, Tile> walk(p.label_ranges, keys.count, own, item.split, item.splits, engine.lane);
  bool visited = false;
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        load_labels<Tile::kBlockK>(key_labels + stage * Tile::kBlockK, keys, first);
      },
      [&](int stage, bool, unsigned first_column) {
        visited = true;
        typename Engine<Tile>::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        each_row<Tile>([&](int f, int half) {
          // The sum of log(1 + odds) is the log of 1 + `all_odds`, which keeps what tiny odds would lose in
          // 1 + odds. Few of a thread's scores share a row: it stays far below the largest float.
          static_assert(2 * Tile::kScoreCols <= 64, "a sum of odds doubles with each");
          float margins = 0.f, all_odds = 0.f, weight_of_tile = 0.f;
          const RowOfPositives own = own_rows[engine.local_row(f, half)];  // registers are short here
          each_score<Tile>([&](int n, int e) {
            float& score = scores[f][n][2 * half + e];
            const int column = engine.local_column(n) + e;
            const bool positive = key_labels[stage * Tile::kBlockK + column] == own.label &&
                                  first_column + unsigned(column) != unsigned(own.excluded);
            const float margin = own.neg_lse - score * own.scale;
            const float odds = positive ? exp2_approx(-fabsf(margin)) : 0.f;
            const float sigma = (margin >= 0.f ? 1.f : odds) * reciprocal_approx(1.f + odds);
            margins += positive ? fmaxf(margin, 0.f) : 0.f;
            all_odds += fmaf(all_odds, odds, odds);
            score = positive ? sigma * float(1 << int(Tile::kSigmaBias)) : 0.f;
            weight_of_tile += positive ? sigma : 0.f;
            count[f][half] += positive;
          });
          loss[f][half] += fmaf(kLn2, margins, log1pf(all_odds));
          pos_weight[f][half] += weight_of_tile;
        });
        if (!with_grad) return;
        engine.template store_weights<Tile::kWeightParts>(scores);
        engine.template accumulate<Tile::kWeightParts>(output, stage);
      });

  const int64_t part = int64_t(item.split) * p.num_anchors + engine.first_row;
  const float losses = engine.sum_over_row(loss), weights = engine.sum_over_row(pos_weight);
  const int counts = engine.sum_over_row(count);
  if (int(threadIdx.x) < min(anchors.count - engine.first_row, Tile::kBlockA)) {
    p.loss_parts[part + threadIdx.x] = losses;
    p.pos_weight_parts[part + threadIdx.x] = weights;
    p.pos_count_parts[part + threadIdx.x] = counts;
  }
  if (with_grad && visited) {  // else no count is above 0, and nobody reads the output
    float* to = p.positive_parts + int64_t(item.split) * p.num_anchors * p.part_channels;
    engine.write(output, to, nullptr, p.part_channels, p.part_channels);
  }
}

// How many blocks share the walk of a tile. gridDim.x blocks run at a time, so that many items are a round:
// of one to four rounds, the number that ends soonest, or one of fewer rounds that ends hardly later.
__device__ __forceinline__ int splits_of_positives(const InfonceForwardParams& p, int tiles) {
  const int blocks = int(gridDim.x);
  int best = int(p.fewest_splits);
  float least = float((tiles * int64_t(best) + blocks - 1) / blocks) / float(best);
  for (int rounds = 1; rounds <= 4; ++rounds) {
    const int splits = min(int(int64_t(rounds) * blocks / max(tiles, 1)), int(p.splits));
    const float time = float(rounds) / float(max(splits, 1));
    if (splits <= best || time >= 0.95f * least) continue;
    best = splits;
    least = time;
  }
  return best;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    infonce_fwd_positives_kernel(InfonceForwardParams p) {
  PositivesItem item{.number = int(blockIdx.x), .split = 0, .splits = 0};
  while (true) {
    SharedMemory memory;
    int* scratch = memory.take<int>(kClassTileScratch);
    int* kept_number = scratch + kClassTileScratch - 1;  // not in a register, which are short in the walk
    const int columns = int(p.keys == nullptr ? p.num_anchors : p.num_keys);
    const bool grouped = are_grouped<Tile::kThreads>(
        p.label_ranges, (columns + Tile::S::kColumns - 1) / Tile::S::kColumns, scratch);
    const ClassTile tile = find_class_tile<Tile::kBlockA, Tile::kThreads>(
        p.sorted_labels, int(p.num_anchors), grouped, scratch, [&](int tiles) {
          item.splits = splits_of_positives(p, tiles);
          item.split = item.number / max(tiles, 1);
          return item.split < item.splits ? item.number % max(tiles, 1) : tiles;
        });
    if (item.number == 0 && threadIdx.x == 0) *p.positive_splits = item.splits;
    if (tile.first < 0) return;
    if (threadIdx.x == 0) *kept_number = item.number;
    add_positives<Tile>(p, tile, item, memory);  // it has barriers
    item.number = *kept_number + int(gridDim.x);
  }
}

// Of the second stage: a team of threads goes through all channels, four of them a thread. There is a team
// for every so many splits, up to a number of teams, which share them.
constexpr int kFinishTeam = 64, kSplitsOfTeam = 16, kMostFinishTeams = 8;
constexpr int kFinishThreads = kFinishTeam * kMostFinishTeams;

// Adds up four channels of every n-th split of a row, as far as their factors are 0 or more: the others were
// not written.
__device__ __forceinline__ float4 sum_of_parts(const float* parts, int64_t stride, const float* factors,
                                               int first, int splits, int step) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int split = first; split < splits; split += step) {
    const float factor = factors[split];
    if (factor < 0.f) continue;
    const float4 part = *reinterpret_cast<const float4*>(parts + split * stride);
    sum = make_float4(fmaf(part.x, factor, sum.x), fmaf(part.y, factor, sum.y), fmaf(part.z, factor, sum.z),
                      fmaf(part.w, factor, sum.w));
  }
  return sum;
}

// The second stage: adds up the splits of an anchor, a block for one, and puts it where the caller has it.
__global__ void __launch_bounds__(kFinishThreads)
    infonce_fwd_finish_kernel(InfonceForwardParams p, float weight_bias, float sigma_bias) {
  SharedMemory memory;
  float4* shares = memory.take<float4>(blockDim.x);            // of the teams, of four channels each
  float* away_factors = memory.take<float>(size_t(p.splits));  // of a split's O; below 0: it was not written
  float* towards_factors = memory.take<float>(size_t(p.splits));  // and of its G
  const int64_t row = blockIdx.x, anchor = p.order[row];
  const int lane = int(threadIdx.x) % kWarp;
  if (p.sorted_labels[row] < 0) {  // it has no part in any tile
    if (threadIdx.x == 0) {
      p.loss[anchor] = p.pos_weight[anchor] = 0.f;
      p.neg_lse[anchor] = -INFINITY;
      p.pos_count[anchor] = 0;
    }
    if (p.anchor_grad == nullptr) return;
    for (int64_t d = threadIdx.x; d < p.grad_channels; d += blockDim.x) {
      p.anchor_grad[anchor * p.grad_channels + d] = 0.f;
    }
    return;
  }
  const int positive_splits = *p.positive_splits;
  const Negatives negatives = combine_negatives(p, row);
  float loss = 0.f, pos_weight = 0.f;
  int pos_count = 0;
  for (int split = lane; split < positive_splits; split += kWarp) {
    loss += p.loss_parts[split * p.num_anchors + row];
    pos_weight += p.pos_weight_parts[split * p.num_anchors + row];
    pos_count += p.pos_count_parts[split * p.num_anchors + row];
  }
  loss = warp_sum(loss);
  pos_weight = warp_sum(pos_weight);
  pos_count = warp_sum(pos_count);
  const bool contrasts = pos_count > 0;
  if (threadIdx.x == 0) {
    p.loss[anchor] = contrasts ? loss / float(pos_count) : 0.f;
    p.neg_lse[anchor] = negatives.lse(weight_bias) * kLn2;
    p.pos_weight[anchor] = contrasts ? pos_weight : 0.f;
    p.pos_count[anchor] = contrasts ? pos_count : 0;
  }
  if (p.anchor_grad == nullptr) return;
  for (int64_t split = threadIdx.x; split < p.splits; split += blockDim.x) {
    const int64_t part = split * p.num_anchors + row;
    const float shift = p.shift_parts[part];
    away_factors[split] = shift == -INFINITY ? -1.f : exp2_approx(shift - negatives.shift);
    towards_factors[split] = split < positive_splits && p.pos_count_parts[part] > 0 ? 1.f : -1.f;
  }
  sync_block();  // the factors are there
  const float push = contrasts && negatives.sum != 0.f ? pos_weight / negatives.sum : 0.f,
              pull = exp2f(-sigma_bias);
  const float scale = contrasts ? unscale_of_keys(p) / (p.temperature * float(pos_count)) : 0.f;
  const int64_t stride = p.num_anchors * p.part_channels;
  const int team = int(threadIdx.x) / kFinishTeam, member = int(threadIdx.x) % kFinishTeam,
            teams = int(blockDim.x) / kFinishTeam;
  for (int64_t first = 0; first < p.grad_channels; first += 4 * kFinishTeam) {
    const int64_t d = first + 4 * member, place = row * p.part_channels + d;
    const bool inside = d < p.grad_channels;
    if (inside) {
      const float4 away = sum_of_parts(p.negative_parts + place, stride, away_factors, team, int(p.splits),
                                       teams),
                   towards = sum_of_parts(p.positive_parts + place, stride, towards_factors, team,
                                          positive_splits, teams);
      shares[threadIdx.x] = make_float4(push * away.x - pull * towards.x, push * away.y - pull * towards.y,
                                        push * away.z - pull * towards.z, push * away.w - pull * towards.w);
    }
    sync_block();  // the shares are there
    if (inside && team == 0) {
      float grad[4] = {0.f, 0.f, 0.f, 0.f};
      for (int other = 0; other < teams; ++other) {
        const float4 share = shares[other * kFinishTeam + member];
        grad[0] += share.x, grad[1] += share.y, grad[2] += share.z, grad[3] += share.w;
      }
      float* to = p.anchor_grad + anchor * p.grad_channels + d;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (d + i < p.grad_channels) to[i] = contrasts ? scale * grad[i] : 0.f;
      }
    }
    sync_block();  // nobody reads these shares any more
  }
}

// --- backward ---

// A power of two that takes weights of at most `peak` to 2^10 and below. That leaves fp16 room above, for a
// log-sum-exp that is not that of these rows may make them larger, and digits below, for weights a thousandth
// as large.
__device__ __forceinline__ float weight_scale(const float* peak) {
  if (peak == nullptr) return 1.f;
  const int exponent = max(int(float_bits(*peak) >> 23 & 255) - 127, -110);
  return power_of_two(9 - exponent);
}

// ds of eq. (5) of one anchor, which holds its log-sum-exp and its factors of negatives and of positives.
__device__ __forceinline__ float negative_gradient(const float4& anchor, float score) {
  return anchor.y * exp2_approx(score - anchor.x);
}
__device__ __forceinline__ float positive_gradient(const float4& anchor, float score) {
  return -anchor.z / (1.f + exp2_approx(score - anchor.x));
}

// Rows are keys and columns anchors: the gradient of the keys. Of anchors that are the keys, both halves at
// once.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    infonce_bwd_keys_kernel(InfonceBackwardParams p) {
  SharedMemory memory;
  const Side keys = keys_of<Tile>(p), anchors = anchors_of<Tile>(p);
  const Engine<Tile> engine(memory, keys, anchors, int(blockIdx.x) * Tile::kBlockA);
  float4* coefficients = memory.take<float4>(2 * Tile::kBlockK);
  float4* own_coefficients = memory.take<float4>(Tile::kBlockA);  // their labels at least
  const float4* all_coefficients = reinterpret_cast<const float4*>(p.coefficients);
  const float scale = *p.score_scale, peak_scale = weight_scale(p.peak);
  const bool symmetric = p.keys == nullptr;

  if (int(threadIdx.x) < Tile::kBlockA) {
    const int64_t row = engine.first_row + threadIdx.x;
    own_coefficients[threadIdx.x] =
        symmetric && row < keys.count
            ? all_coefficients[row]
            : make_float4(0.f, 0.f, 0.f, bits_float(uint32_t(engine.label(keys, row))));
  }
  sync_block();  // they are there, also for a block that visits nothing
  typename Engine<Tile>::Output output = {};

  const LabelRange own = range_of_labelled(keys, engine.first_row, Tile::kBlockA, engine.lane);
  Walk<Pass::kBackward, Tile> walk(p.label_ranges, anchors.count, own, int(blockIdx.y), int(gridDim.y),
                                   engine.lane);
  engine.run(
      walk,
      [&](int stage, int64_t first) {
        if (int(threadIdx.x) >= Tile::kBlockK) return;
        const bool inside = first + threadIdx.x < anchors.count;  // zeros behind: their factors are 0
        cp_async_16(coefficients + stage * Tile::kBlockK + threadIdx.x,
                    inside ? all_coefficients + first + threadIdx.x : all_coefficients, inside ? 16 : 0);
      },
      [&](int stage, bool mixed, unsigned first_column) {
        typename Engine<Tile>::Scores scores;
        engine.template multiply_rows<1>(scores, stage);
        each_score<Tile>([&](int n, int e) {
          const int column = engine.local_column(n) + e;
          const int64_t place = int64_t(first_column) + column;
          const float4 anchor = coefficients[stage * Tile::kBlockK + column];
          const int label = place < anchors.count ? int(float_bits(anchor.w)) : -1;
          each_row<Tile>([&](int f, int half) {
            float& score = scores[f][n][2 * half + e];
            const float4 mirror = own_coefficients[engine.local_row(f, half)];  // registers are short here
            const float scaled = score * scale;
            if (!mixed || label != int(float_bits(mirror.w))) {
              score =
                  negative_gradient(anchor, scaled) + (symmetric ? negative_gradient(mirror, scaled) : 0.f);
            } else {
              score =
                  positive_gradient(anchor, scaled) + (symmetric ? positive_gradient(mirror, scaled) : 0.f);
              const int64_t row = int64_t(engine.first_row) + engine.local_row(f, half);
              if (p.exclude_self && label >= 0 && row == (symmetric ? place : p.order[place])) score = 0.f;
            }
            // An anchor that takes no part has factors of 0, its mirror may be anything.
            score = mixed && label < 0 ? 0.f : score * peak_scale;
          });
        });
        engine.template store_weights<Tile::kWeightParts>(scores);
        engine.template accumulate<Tile::kWeightParts>(output, stage);
      });

  const float unscale = (p.unscale == nullptr ? 1.f : p.unscale[0]) / (peak_scale * p.temperature);
  each_output<Tile>(
      [&](int f, int n, int i) {  // a row without a label takes no part, whatever the anchors hold
        const int own_label = int(float_bits(own_coefficients[engine.local_row(f, i / 2)].w));
        output[f][n][i] = own_label < 0 ? 0.f : output[f][n][i] * unscale;
      });
  if (p.grad_parts == nullptr) {
    engine.write(output, p.grad, keys.order, p.grad_channels, p.grad_channels);
  } else {
    float* to = p.grad_parts + int64_t(blockIdx.y) * keys.count * p.grad_channels;
    engine.write(output, to, nullptr, p.grad_channels, p.grad_channels);
  }
}

// The second stage of the backward, a thread for each element: adds the splits in order.
__global__ void __launch_bounds__(kFinishTeam) infonce_bwd_finish_kernel(InfonceBackwardParams p) {
  const int64_t count = (p.keys == nullptr ? p.num_anchors : p.num_keys) * p.grad_channels;
  const int64_t element = int64_t(blockIdx.x) * kFinishTeam + threadIdx.x;
  if (element >= count) return;
  float sum = 0.f;
  for (int64_t split = 0; split < p.splits; ++split) sum += p.grad_parts[split * count + element];
  const int64_t row = element / p.grad_channels, channel = element % p.grad_channels;
  p.grad[(p.keys == nullptr ? p.order[row] : row) * p.grad_channels + channel] = sum;
}

}  // namespace pxc::cuda
