// The inner loops of enqueue's two passes over the map: the pixels' squares over all channels, and class sums
// over the pixels of one or two channels.
//
// This file is compiled once for each instruction set (PXC_ISA), so nothing in it may be shared with another
// translation unit: no standard templates, only loops.
#include <cstring>

#include "../cpu.h"
#include "../half.h"

namespace pxc::cpu {
namespace PXC_ISA {
namespace {

// Four planes at a time: the sums, which stay in L1, are read and written a quarter as often.
template <class In>
void add_squares_of(const In* planes, int64_t num_planes, int64_t stride, int64_t size, float* sums) {
  int64_t n = 0;
  for (; n + 4 <= num_planes; n += 4) {
    const In *a = planes + n * stride, *b = a + stride, *c = b + stride, *d = c + stride;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float first = load(a + i) * load(a + i) + load(b + i) * load(b + i);
      const float second = load(c + i) * load(c + i) + load(d + i) * load(d + i);
      sums[i] += first + second;
    }
  }
  for (; n < num_planes; ++n) {
    const In* a = planes + n * stride;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sums[i] += load(a + i) * load(a + i);
  }
}

// One register of AVX-512, two of AVX2, four of SSE.
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using LaneBits = uint32_t __attribute__((vector_size(4 * kLanes)));

// How many elements ahead to prefetch. Groups are only nearly in memory order, which is not enough for the
// hardware's own prefetcher.
constexpr int64_t kAhead = 1024;

template <class Vector>
inline void read(const void* from, Vector& lanes) {
  std::memcpy(&lanes, from, sizeof(lanes));
}

template <int Planes>
void add(const Group* groups, int64_t num_groups, const float* const* planes, const float* weights,
         float* strands) {
  for (int64_t g = 0; g < num_groups;) {
    const int64_t label = groups[g].label;
    float* strand = strands + label * Planes * kLanes;
    Lanes sum[Planes];  // in registers along a run of one class
    for (int n = 0; n < Planes; ++n) read(strand + n * kLanes, sum[n]);
    for (; g < num_groups && groups[g].label == label; ++g) {
      LaneBits member;
      Lanes scale, pixels;
      read(groups[g].member, member);
      read(weights + groups[g].first, scale);
      for (int n = 0; n < Planes; ++n) {
        __builtin_prefetch(planes[n] + groups[g].first + kAhead);
        read(planes[n] + groups[g].first, pixels);
        sum[n] += Lanes(LaneBits(pixels * scale) & member);
      }
    }
    for (int n = 0; n < Planes; ++n) std::memcpy(strand + n * kLanes, &sum[n], sizeof(Lanes));
  }
}

}  // namespace

void add_squares(DType dtype, const void* planes, int64_t num_planes, int64_t stride, int64_t size,
                 float* sums) {
  with_dtype(dtype, [&](auto* element) {
    add_squares_of(static_cast<decltype(element)>(const_cast<void*>(planes)), num_planes, stride, size, sums);
  });
}

void add_groups(const Group* groups, int64_t num_groups, const float* const* planes, int num_planes,
                const float* weights, float* strands) {
  if (num_planes == 2) {
    add<2>(groups, num_groups, planes, weights, strands);
  } else {
    add<1>(groups, num_groups, planes, weights, strands);
  }
}

}  // namespace PXC_ISA
}  // namespace pxc::cpu
