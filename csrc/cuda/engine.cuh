// The engine of every pass: a block keeps a tile of rows in shared memory and walks over tiles of columns.
// Rows times columns give scores, which the caller turns into weights; weights times columns add up to the
// output.
#pragma once

#include "tile.cuh"
#include "warp.cuh"

namespace pxc::cuda {

struct Side {
  const unsigned char* rows;  // [count, row_bytes]
  const int32_t* labels;      // [count], in the order of visits
  const int32_t* order;       // [count] row of each visit, or null: as they lie
  int count, row_bytes;
};

__device__ __forceinline__ int label_at(const Side& side, int64_t place) {
  return place < side.count ? side.labels[place] : -1;
}

struct Visit {
  int tile;
  bool mixed;       // a column may have the label of one of the block's rows, or none
  bool unlabelled;  // some column has no label, or the tile ends past the last column
};

// Loops over a thread's registers, unrolled: an index known only at run time would force them into local
// memory.
template <class Tile, class Body>
__device__ __forceinline__ void each_row(Body body) {
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) body(f, half);
  }
}
template <class Tile, class Body>
__device__ __forceinline__ void each_score(Body body) {  // columns within a row
#pragma unroll
  for (int n = 0; n < Tile::kScoreCols; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) body(n, e);
  }
}
template <class Tile, class Body>
__device__ __forceinline__ void each_output(Body body) {
#pragma unroll
  for (int f = 0; f < Tile::kFragments; ++f) {
#pragma unroll
    for (int n = 0; n < Tile::kOutputCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(f, n, i);
    }
  }
}

// One block's work, weights being stored as `kParts` 16-bit numbers that add up to them. Places in fragments
// are those of the PTX manual: of a 16 x 8 piece of sums, a thread holds four, at rows `group` and `group` +
// 8, columns 2 `quad` and the next.
template <class Tile, int kParts>
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
  unsigned char* weights;  // [kParts, kBlockA, kBlockK]
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
    weights = memory.template take<unsigned char>(kParts * kWeightBytes);
    exchange = memory.template take<float>(Tile::kColWarps * Tile::kBlockA);
  }

  // The shared memory that the constructor takes, if a row has `row_stride` bytes there.
  static constexpr size_t bytes(int64_t row_stride) {
    return shared_bytes<unsigned char>((Tile::kBlockA + 2 * Tile::kBlockK) * row_stride) +
           shared_bytes<unsigned char>(kParts * kWeightBytes) +
           shared_bytes<float>(Tile::kColWarps * Tile::kBlockA);
  }

  // Bytes of a row: in device memory, in shared memory, and of one plane in shared memory.
  __device__ __forceinline__ int row_bytes() const {
    return Tile::kFull ? Tile::kMaxRowBytes : rows.row_bytes;
  }
  __device__ __forceinline__ int row_stride() const { return (row_bytes() + 127) / 128 * 128; }
  __device__ __forceinline__ int plane_stride() const { return row_stride() / Tile::kPlanes; }

  // The place within the block's tile of row `half` (0 or 1) of fragment `f`.
  __device__ __forceinline__ int local_row(int f, int half) const {
    return (row_warp * Tile::kFragments + f) * 16 + half * 8 + group;
  }
  // The place within a tile of columns of the first of the two that piece `n` of the scores has.
  __device__ __forceinline__ int local_column(int n) const {
    return (col_warp * Tile::kScoreCols + n) * 8 + quad * 2;
  }
  // Channel of piece `n` of the output: warps take turns by 16, so that any number of channels is shared.
  __device__ __forceinline__ int channel(int n) const {
    return (n / 2 * Tile::kColWarps + col_warp) * 16 + n % 2 * 8;
  }

  // Starts copying kCount rows of a side. Rows without a label become 0, whatever they hold (0 * NaN is NaN).
  template <int kCount>
  __device__ __forceinline__ void load(unsigned char* tile, const Side& side, int64_t first,
                                       bool check_labels) const {
    const int padded = row_stride() / 16;
    for (int row = int(threadIdx.x) / 8; row < kCount; row += Tile::kThreads / 8) {
      const bool wanted = !check_labels || label_at(side, first + row) >= 0;
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

  // The same for columns that are stored in the order of visits, all have labels, and are as long as the tile
  // allows.
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

  // Visits the tiles of a walk and calls weigh(stage, mixed, first column) for each, with the tile in shared
  // memory. load_extra(stage, first column) starts the copies that accompany a tile. With nothing to visit it
  // returns at once: what threads wrote before is shown to all by its first barrier, or to nobody.
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

  __device__ __forceinline__ static void clear(Scores& scores) {
    each_row<Tile>(
        [&](int f, int half) { each_score<Tile>([&](int n, int e) { scores[f][n][2 * half + e] = 0.f; }); });
  }

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

  // For whole rows, where the registers cannot hold the fragments of all of a warp's rows for two steps:
  // loads run ahead by one step of the columns, and by two fragments of the rows.
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
    clear(scores);
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

  // ldmatrix loads four matrices at a time: two pieces of the columns in one step, or one piece in two steps.
  static constexpr bool kPairs = Tile::kScoreCols % 2 == 0;
  static constexpr int kSteps = kPairs ? 1 : 2;

  // Fragments of kSteps steps of 16 channels.
  struct Fragments {
    uint32_t rows[kSteps][Tile::kPlanes][Tile::kFragments][4];
    uint32_t columns[kSteps][Tile::kPlanes][Tile::kScoreCols][2];
  };

  // Where a lane reads its part of the fragments.
  struct LanePlaces {
    const unsigned char* columns;  // of the warp
    int column_offset, row_offset;
  };

  // Loads the fragments that begin at `chunk` of the 128 bytes from `byte` on, in each plane.
  __device__ __forceinline__ void load_fragments(Fragments& to, const LanePlaces& from, int byte,
                                                 int chunk) const {
#pragma unroll
    for (int plane = 0; plane < Tile::kPlanes; ++plane, byte += plane_stride()) {
#pragma unroll
      for (int n = 0; n < Tile::kScoreCols; n += kPairs ? 2 : 1) {
        uint32_t bits[4];
        ldmatrix_x4(bits,
                    from.columns + byte + n * 8 * row_stride() + offset_further(from.column_offset, chunk));
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
                                                   offset_further(from.row_offset, chunk + 2 * step));
        }
      }
    }
  }

  // With a single score per warp, every product would wait for the one before: two sums take turns.
  static constexpr bool kTwoSums = Tile::kPlanes == 2 || Tile::kFragments * Tile::kScoreCols == 1;

  // Tensor cores truncate when they add to a sum, fp32 additions round. With two planes, the products of the
  // high planes are therefore added up by fp32 additions, and the small products in a sum of their own.
  __device__ __forceinline__ static void multiply_fragments(Scores& scores, Scores& others,
                                                            const Fragments& of) {
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
          if constexpr (Tile::kPlanes == 1) {
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
  }

  template <int kUnroll>
  __device__ __forceinline__ void multiply_some_rows(Scores& scores, int stage) const {
    const int row = row_warp * Tile::kFragments * 16 + lane % 16;
    const int column = col_warp * Tile::kScoreCols * 8 + lane % 8 + (kPairs ? lane / 16 * 8 : 0);
    const LanePlaces places = {
        .columns = column_tile(stage),
        .column_offset = tile_offset(column, kPairs ? lane / 8 % 2 : lane / 8, row_stride()),
        .row_offset = tile_offset(row, lane / 16, row_stride()),
    };
    Scores others;
    clear(scores);
    if (kTwoSums) clear(others);
    if constexpr (Tile::kFull && kPairs) {
      // The next step's fragments are loaded while this one's are multiplied. With two planes, a loop
      // unrolled whole would have more loads in flight than there are registers.
      constexpr int kAll = Tile::kMaxRowBytes / Tile::kPlanes / 32;
      constexpr int kUnrolled = Tile::kPlanes == 2 ? 4 : kAll;
      Fragments fragments[2];
      load_fragments(fragments[0], places, 0, 0);
#pragma unroll kUnrolled
      for (int step = 0; step < kAll; ++step) {
        if (step + 1 < kAll) {
          load_fragments(fragments[(step + 1) % 2], places, (step + 1) / 4 * 128, (step + 1) % 4 * 2);
        }
        multiply_fragments(scores, others, fragments[step % 2]);
      }
    } else {
#pragma unroll 1
      for (int byte = 0; byte < plane_stride(); byte += 128) {
#pragma unroll kUnroll
        for (int chunk = 0; chunk < 8; chunk += 2 * kSteps) {
          Fragments fragments;
          load_fragments(fragments, places, byte, chunk);
          multiply_fragments(scores, others, fragments);
        }
      }
    }
    if (!kTwoSums) return;
    each_row<Tile>([&](int f, int half) {
      each_score<Tile>([&](int n, int e) { scores[f][n][2 * half + e] += others[f][n][2 * half + e]; });
    });
  }

  // The byte at which a chunk of the weights begins, within one part.
  static constexpr int kWeightStride = Tile::kBlockK * int(sizeof(T));  // bytes of a row
  __device__ __forceinline__ static int weight_offset(int row, int chunk) {
    constexpr int kChunks = kWeightStride / 16;
    return row * kWeightStride + swizzled<kChunks>(row, chunk) * 16;
  }

  // Hands the warp's weights to the warps of the same rows, in `kParts` parts that add up to them.
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

  // The ids are constants: with a computed one, the compiler would reserve all 16 barriers of a block.
  __device__ __forceinline__ void sync_row_warps() const {
    static_assert(Tile::kRowWarps <= 2, "an id for each");
    if (Tile::kRowWarps == 1 || row_warp == 0) {
      sync_group(1, Tile::kColWarps * kWarp);
    } else {
      sync_group(2, Tile::kColWarps * kWarp);
    }
  }

  // output += weights . columns, for the warp's rows and its share of the channels. If a row fills the tile,
  // every piece of 16 channels exists, so the bounds test, which stops the compiler from hoisting loads, is
  // compiled out.
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
      accumulate_parts<true>(output, stage);
    } else {
      accumulate_parts<false>(output, stage);
    }
  }

  static constexpr int kWeightSteps = Tile::kBlockK / 16;                     // of the tensor cores
  static constexpr int kStepsOfPlanes = kWeightSteps < 2 ? kWeightSteps : 2;  // that are summed apart

  __device__ __forceinline__ void load_weights(uint32_t (&a)[4], int f, int step, int part) const {
    const int offset = weight_offset(row_warp * Tile::kFragments * 16 + lane % 16, lane / 16);
    ldmatrix_x4(a, weights + offset_further(offset, 2 * step) + f * 16 * kWeightStride + part * kWeightBytes);
  }

  // A step's columns by 16 channels, those of pieces n and n + 1 of the output.
  __device__ __forceinline__ void load_columns(uint32_t (&b)[4], int stage, int step, int plane,
                                               int n) const {
    const unsigned char* tile = column_tile(stage) + step * 16 * row_stride() + plane * plane_stride();
    const int offset = tile_offset(lane % 16, 2 * col_warp + lane / 16, row_stride());
    ldmatrix_x4_trans(b, tile + offset_further(offset, n / 2 * Tile::kColWarps * 2));
  }

  // Columns are read once for both parts of the weights.
  template <bool kWhole>
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

  // The same for two parts and two planes, a step or two at a time, summed apart: adding that sum to the
  // output rounds, where a tensor core would truncate.
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

  // Sums a value of each row over the threads that share the row; thread `row` of the block gets the sum. The
  // whole block calls it.
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

  // Writes output [rows, stride], leaving out rows and channels past the last; row i goes to places[i] (null:
  // to i).
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

}  // namespace pxc::cuda
