// Which keys the tiles of InfoNCE hold. Banks keep the keys of one class together; a tile that holds a single
// class needs no masks, and can leave out the anchors of that class altogether.
#include <algorithm>

#include "cpu.h"

namespace pxc::cpu {
namespace {

// First position after `start` whose label differs from the one at `start`, or `end`.
int64_t end_of_run(const int32_t* labels, int64_t start, int64_t end) {
  int64_t i = start;
  while (i < end && labels[i] == labels[start]) ++i;
  return i;
}

}  // namespace

// Cuts the keys into tiles of at most max_keys. Long runs of one label become tiles of their own, of even
// sizes; short runs share a mixed tile; keys without a label are left out where possible.
void plan_tiles(const TilesParams& p) {
  const int64_t long_run = std::max<int64_t>(1, p.max_keys / 8);
  int64_t count = 0;
  const auto add = [&](int64_t first, int64_t size, int64_t label) {
    if (count < p.capacity) {
      p.tiles[3 * count] = first;
      p.tiles[3 * count + 1] = size;
      p.tiles[3 * count + 2] = label;
    }
    ++count;
  };
  int64_t start = 0;
  while (start < p.num_keys) {
    const int64_t label = p.key_labels[start];
    int64_t end = end_of_run(p.key_labels, start, p.num_keys);
    if (label < 0) {
      start = end;
      continue;
    }
    if (end - start >= long_run || end == p.num_keys) {
      const int64_t parts = (end - start + p.max_keys - 1) / p.max_keys;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t first = start + (end - start) * i / parts;
        add(first, start + (end - start) * (i + 1) / parts - first, label);
      }
    } else {
      int64_t labelled = end;  // where the tile ends: after its last labelled key
      while (end < p.num_keys && end - start < p.max_keys) {
        const int64_t next = end_of_run(p.key_labels, end, std::min(p.num_keys, end + long_run));
        if (next - end >= long_run) break;
        if (p.key_labels[end] >= 0) labelled = std::min(next, start + p.max_keys);
        end = next;
      }
      end = labelled;
      add(start, end - start, -1);
    }
    start = end;
  }
  *p.num_tiles = count;
}

void collect_keys(const CollectKeysParams& p) {
  int64_t found = 0, i = *p.cursor;
  for (; i < p.num_keys && found < p.max_keys; ++i) {
    p.indices[found] = i;
    found += p.key_labels[i] == p.label;
  }
  *p.cursor = i;
  *p.found = found;
}

}  // namespace pxc::cpu
