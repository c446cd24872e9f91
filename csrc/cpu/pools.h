// Pixels sorted into pools (one per image, class and kind), and the smallest (priority, pixel) of a pool.
// Integers only, so the outcome depends on nothing but the input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>

#include "cpu.h"

namespace pxc::cpu {

// Keys are ordered like the pairs (priority, pixel); pixel < 2^32.
inline uint64_t pool_key(int32_t priority, int64_t pixel) {
  return uint64_t(uint32_t(priority) ^ 0x80000000u) << 32 | uint64_t(pixel);
}

inline int64_t pixel_of(uint64_t key) { return int64_t(key & 0xffffffffu); }

// Leaves the `keep` smallest keys of a pool in front, in pixel order.
inline void keep_smallest(uint64_t* pool, int64_t size, int64_t keep) {
  if (keep < size) std::nth_element(pool, pool + keep, pool + size);
  std::sort(pool, pool + keep, [](uint64_t a, uint64_t b) { return pixel_of(a) < pixel_of(b); });
}

// The class of a pixel, or -1 if it is ignored. Throws BadValue for a label that is neither.
inline int64_t class_of(const int64_t* labels, int64_t position, int64_t num_classes, int64_t ignore_index) {
  const int64_t label = labels[position];
  if (label == ignore_index) return -1;
  if (label < 0 || label >= num_classes) throw BadValue{position, label};
  return label;
}

// Carries an exception out of a parallel loop, which no exception may leave by itself. Of several bad values
// it keeps the one at the first position.
class Guard {
 public:
  template <class Body>
  void run(Body body) {
    try {
      body();
    } catch (const BadValue& found) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!first_ || found.position < first_->position) first_ = found;
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      other_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) throw *first_;
    if (other_) std::rethrow_exception(other_);
  }

 private:
  std::mutex mutex_;
  std::optional<BadValue> first_;
  std::exception_ptr other_;
};

}  // namespace pxc::cpu
