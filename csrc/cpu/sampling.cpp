// Hard-anchor sampling: count the pixels of each (image, class) by hardness, plan how many anchors each pair
// gives, sort the pixels into pools, and take the smallest (priority, pixel) of every pool.
// The rules are numbered as in `backends/reference.py`, which states them in full.
#include <vector>

#include "pools.h"

namespace pxc::cpu {
namespace {

enum Kind { kHard = 0, kEasy = 1, kKinds = 2 };

struct Pool {
  int64_t size = 0;
  int64_t keep = 0;
  int64_t offset = 0;       // where its keys start among the image's
  int64_t first_row = 0;    // where its rows start in the output
  int64_t first_pixel = 0;  // of the pair, in raster order; kept with the hard pool
};

struct Pair {
  Pool pools[kKinds];
  int64_t size() const { return pools[kHard].size + pools[kEasy].size; }
};

// Rule 1.
void count_image(const SamplingParams& p, int64_t image, Pair* pairs) {
  const int64_t first = image * p.pixels;
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
    const int64_t label = class_of(p.labels, first + pixel, p.num_classes, p.ignore_index);
    if (label < 0) continue;
    Pair& pair = pairs[label];
    if (pair.size() == 0) pair.pools[kHard].first_pixel = pixel;
    ++pair.pools[p.predictions[first + pixel] != label ? kHard : kEasy].size;
  }
}

// Rules 2 to 4 and 6; returns the number of rows.
int64_t plan(const SamplingParams& p, std::vector<Pair>& pairs) {
  std::vector<int64_t> eligible;
  for (int64_t i = 0; i < int64_t(pairs.size()); ++i) {
    if (pairs[i].size() > 0 && pairs[i].size() >= p.min_pixels) eligible.push_back(i);
  }
  if (eligible.empty()) return 0;
  const int64_t views =
      std::max<int64_t>(1, std::min<int64_t>(p.max_samples / int64_t(eligible.size()), p.max_views));
  if (int64_t(eligible.size()) > p.max_samples) {
    const auto priority = [&](int64_t i) {
      return p.priority[i / p.num_classes * p.pixels + pairs[i].pools[kHard].first_pixel];
    };
    const auto before = [&](int64_t a, int64_t b) {
      return priority(a) != priority(b) ? priority(a) < priority(b) : a < b;
    };
    std::nth_element(eligible.begin(), eligible.begin() + p.max_samples, eligible.end(), before);
    eligible.resize(p.max_samples);
  }
  for (int64_t i : eligible) {
    Pool *hard = &pairs[i].pools[kHard], *easy = &pairs[i].pools[kEasy];
    const int64_t take = std::min(views, pairs[i].size());
    hard->keep = std::min(hard->size, std::max(take * p.hard_share >> 24, take - easy->size));
    easy->keep = take - hard->keep;
  }
  int64_t rows = 0;
  for (int64_t label = 0; label < p.num_classes; ++label) {
    for (int64_t image = 0; image < p.batch; ++image) {
      for (Pool& pool : pairs[image * p.num_classes + label].pools) {
        pool.first_row = rows;
        rows += pool.keep;
      }
    }
  }
  return rows;
}

// Rules 5 and 6.
void select_image(const SamplingParams& p, int64_t image, Pair* pairs) {
  const int64_t first = image * p.pixels;
  uint64_t* keys = p.pool_keys + first;
  int64_t used = 0;
  for (int64_t label = 0; label < p.num_classes; ++label) {
    for (Pool& pool : pairs[label].pools) {
      pool.offset = used;
      if (pool.keep > 0) used += pool.size;
      pool.size = 0;
    }
  }
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
    const int64_t label = p.labels[first + pixel];
    if (label == p.ignore_index) continue;
    Pool& pool = pairs[label].pools[p.predictions[first + pixel] != label ? kHard : kEasy];
    if (pool.keep > 0) keys[pool.offset + pool.size++] = pool_key(p.priority[first + pixel], pixel);
  }
  for (int64_t label = 0; label < p.num_classes; ++label) {
    for (const Pool& pool : pairs[label].pools) {
      keep_smallest(keys + pool.offset, pool.size, pool.keep);
      for (int64_t i = 0; i < pool.keep; ++i) {
        p.indices[pool.first_row + i] = first + pixel_of(keys[pool.offset + i]);
        p.anchor_labels[pool.first_row + i] = int32_t(label);
      }
    }
  }
}

}  // namespace

void sampling(const SamplingParams& p) {
  std::vector<Pair> pairs(p.batch * p.num_classes);
  Guard guard;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) {
    guard.run([&] { count_image(p, image, &pairs[image * p.num_classes]); });
  }
  guard.rethrow();
  const int64_t rows = plan(p, pairs);
  *p.count = int32_t(rows);
  std::fill(p.indices + rows, p.indices + p.max_samples, int64_t(0));
  std::fill(p.anchor_labels + rows, p.anchor_labels + p.max_samples, int32_t(-1));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t image = 0; image < p.batch; ++image) {
    select_image(p, image, &pairs[image * p.num_classes]);
  }
}

}  // namespace pxc::cpu
