// Sorting by tiles. A tile of keys is sorted in shared memory by one block; if there is more than one tile, a
// warp finds the rank of each key by a binary search in every other tile. A key's last bits are its original
// place in the tile, so that no two are equal and ties stay in order.
#pragma once

#include "warp.cuh"

namespace pxc::cuda {

// Sorts `size` keys in shared memory, a power of two above kWarp, in a bitonic network: one compare per
// thread and step, whatever the data. A block of kSortThreads calls it, and needs no barrier before or after.
__device__ __forceinline__ void sort_tile(uint64_t* keys, int size) {
  const int thread = int(threadIdx.x);
  sync_block();  // all keys are there
  for (int sorted = 2; sorted <= size; sorted *= 2) {
    for (int stride = sorted / 2; stride > 0; stride /= 2) {
      const int low = 2 * thread - (thread & (stride - 1)), high = low + stride;
      if (high < size) {
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & sorted) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      // Between two steps of short strides a warp stays within its own 64 keys; else it needs those of other
      // warps.
      const int next = stride > 1 ? stride / 2 : sorted;
      if (max(stride, next) > kWarp) {
        sync_block();
      } else {
        sync_warp();
      }
    }
  }
}

// The `size` for sort_tile that holds `count` keys.
__device__ __forceinline__ int keys_to_sort(int64_t count) {
  int size = 2 * kWarp;
  while (size < kTileKeys && size < count) size *= 2;
  return size;
}

// The first place in [low, high] of a sorted array before which `value` could be inserted.
template <class T, class Index>
__device__ __forceinline__ Index lower_bound(const T* sorted, Index low, Index high, T value) {
  while (low < high) {
    const Index middle = (low + high) / 2;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// How many keys of all tiles come before the one at `place`: smaller ones, and equal ones of earlier tiles.
// `keys` are [tiles, kTileKeys], each tile sorted. A warp calls it.
__device__ __forceinline__ int64_t rank_in_tiles(const uint64_t* keys, int64_t tiles, int64_t place) {
  const uint64_t key = keys[place] >> kTileBits;
  const int64_t own = place / kTileKeys;
  int64_t before = 0;
  for (int64_t tile = int(threadIdx.x) % kWarp; tile < tiles; tile += kWarp) {
    const uint64_t limit = (key + (tile < own)) << kTileBits;
    before += tile == own ? place % kTileKeys : lower_bound(keys + tile * kTileKeys, 0, kTileKeys, limit);
  }
  return warp_sum(before);
}

// Sorts 0 to count - 1 by key_of(i), of 54 bits, ties in their order; a block of kSortThreads for each tile.
// With one tile `tiles_of_keys` is null, and emit(place in the order, key, i) is called for each; with
// several, the sorted keys are left in it, [tiles, kTileKeys], for emit_ranked.
template <class KeyOf, class Emit>
__device__ __forceinline__ void sort_numbers(SharedMemory& memory, int64_t tile, int64_t count,
                                             uint64_t* tiles_of_keys, KeyOf key_of, Emit emit) {
  uint64_t* keys = memory.take<uint64_t>(kTileKeys);
  const int64_t first = tile * kTileKeys;
  const int size = tiles_of_keys == nullptr ? keys_to_sort(count) : kTileKeys;
  for (int i = int(threadIdx.x); i < size; i += kSortThreads) {
    keys[i] = first + i < count ? uint64_t(key_of(first + i)) << kTileBits | uint64_t(i) : ~uint64_t(0);
  }
  sort_tile(keys, size);
  for (int i = int(threadIdx.x); i < size; i += kSortThreads) {
    if (tiles_of_keys != nullptr) {
      tiles_of_keys[first + i] = keys[i];
    } else if (i < count) {
      emit(int64_t(i), keys[i] >> kTileBits, int64_t(keys[i] % kTileKeys));
    }
  }
}

// Calls emit(place in the order, key, i) for the key at `place` of the tiles that sort_numbers left; a warp
// calls it, and its first lane emits. The padding of the last tile is sorted to its end, so only places below
// `count` matter.
template <class Emit>
__device__ __forceinline__ void emit_ranked(const uint64_t* tiles_of_keys, int64_t tiles, int64_t place,
                                            Emit emit) {
  const int64_t rank = rank_in_tiles(tiles_of_keys, tiles, place);
  if (threadIdx.x % kWarp != 0) return;
  const uint64_t key = tiles_of_keys[place];
  emit(rank, key >> kTileBits, place / kTileKeys * kTileKeys + int64_t(key % kTileKeys));
}

}  // namespace pxc::cuda
