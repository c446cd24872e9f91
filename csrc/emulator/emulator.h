// The other side of portable.h, for compilers that are not nvcc: CUDA kernels as plain C++, run on a CPU.
//
// A launch runs its blocks one after another, and every thread of a block is a fiber (emulator.cpp). What
// would be undefined on a GPU is an error here: `launch` throws std::runtime_error with the kernel, block,
// thread and the calls concerned. It finds
//   - barriers that threads reach in different places, not at all, or as half a warp;
//   - warp collectives in different places, with a mask that lacks the caller, or reading a lane outside it;
//   - deadlocks;
//   - cp.async and ldmatrix on addresses that are misaligned or not in shared memory;
//   - a kernel that ends before its copies have arrived;
//   - shared memory beyond what the launch asked for, or laid out differently by different threads;
//   - launches that a device would refuse.
// Memory is shown to the sanitizers: an array of shared memory is an allocation of its own for
// AddressSanitizer, and for ThreadSanitizer nothing but a barrier orders two threads, and nothing at all two
// blocks of a launch. So every access to memory that a kernel makes through these functions is inline,
// compiled like the kernel, while the emulator's own state is touched in emulator.cpp only, which is compiled
// without ThreadSanitizer.
//
// PXC_EMULATOR_SCHEDULE sets the order in which threads and blocks come: "forward", "reverse" or a number,
// the seed of a random one. A right kernel gives the same bits under all of them.
//
// PXC_EMULATOR_SHARED sets the shared memory of a multiprocessor, in KB: 100, as the smallest devices have,
// to 228, the default; a block may have one less. What a kernel does may depend on it.
//
// PXC_EMULATOR_SUMS sets how mma rounds its sums: "nearest", after every product, or "truncated", once and
// towards zero, as tensor cores do. Over a long walk that adds up.
#pragma once

#include <math.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// --- CUDA's vector types ---

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define PXC_DEFINE_VECTORS(Name, Element)                                \
  struct alignas(8) Name##2 { Element x, y; };                           \
  struct alignas(16) Name##4 { Element x, y, z, w; };                    \
  inline Name##2 make_##Name##2(Element x, Element y) { return {x, y}; } \
  inline Name##4 make_##Name##4(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }
PXC_DEFINE_VECTORS(float, float)
PXC_DEFINE_VECTORS(int, int)
PXC_DEFINE_VECTORS(uint, unsigned)
#undef PXC_DEFINE_VECTORS

// --- built-in variables; not const, as they change with every switch of fibers ---

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- CUDA's arithmetic in the global namespace; the rest is in math.h ---

#define PXC_DEFINE_MIN_MAX(Type)                            \
  inline Type min(Type a, Type b) { return b < a ? b : a; } \
  inline Type max(Type a, Type b) { return a < b ? b : a; }
PXC_DEFINE_MIN_MAX(int)
PXC_DEFINE_MIN_MAX(unsigned)
PXC_DEFINE_MIN_MAX(long)
PXC_DEFINE_MIN_MAX(unsigned long)
PXC_DEFINE_MIN_MAX(long long)
PXC_DEFINE_MIN_MAX(unsigned long long)
#undef PXC_DEFINE_MIN_MAX
// Of a number and any NaN, the number. (The C library makes an exception of signalling ones.)
inline float min(float a, float b) { return b < a || a != a ? b : a; }
inline float max(float a, float b) { return a < b || a != a ? b : a; }
inline double min(double a, double b) { return b < a || a != a ? b : a; }
inline double max(double a, double b) { return a < b || a != a ? b : a; }

namespace pxc {
namespace emulator {

// Where a kernel calls one of the functions below: their last argument, left to its default.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// --- what emulator.cpp does ---

using Body = void (*)(const void* arguments);

void run(const char* name, dim3 grid, int threads, size_t shared, Body body, const void* arguments);
void* take(int index, size_t bytes, Site site);  // the block's array number `index`
size_t shared_of_multiprocessor();

void block_barrier(Site site);
void group_barrier(int id, int threads, Site site);
void warp_barrier(Site site);

uint64_t exchange(const char* what, uint64_t value, int source, unsigned mask, Site site);
unsigned vote(bool predicate, unsigned mask, Site site);

enum class Operands { kHalf, kBFloat16 };
void multiply(Operands operands, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site site);

// ldmatrix: true in the lane that arrives last, which then reads the rows of all and hands them over.
bool offer_row(const void* row, Site site);
const uint32_t* row_of(int lane);
void hand_over(const uint32_t (&rows)[kWarp][4], bool transposed);
void take_fragment(uint32_t (&fragment)[4]);

// A copy on its way: `bytes` of `size` come from `global`, the rest are zeros.
struct Copy {
  void* shared;
  const void* global;
  int size, bytes;
  Site site;
};
void issue(const Copy& copy);
void commit();
bool due(int pending, Copy& copy);  // the next copy that has to arrive; false if there is none

// --- accesses to memory, compiled with the kernel ---

// A copy may land at any time from its issue to the wait. Here it spoils the target at once, and arrives at
// the wait.
inline void start_copy(const Copy& copy) {
  issue(copy);
  uint32_t* target = static_cast<uint32_t*>(copy.shared);
  for (int i = 0; i < copy.size / 4; ++i) target[i] = 0xffffffffu;
}

inline void finish_copies(int pending) {
  Copy copy;
  while (due(pending, copy)) {
    uint32_t* target = static_cast<uint32_t*>(copy.shared);
    const uint32_t* source = static_cast<const uint32_t*>(copy.global);
    for (int i = 0; i < copy.size / 4; ++i) target[i] = 4 * i < copy.bytes ? source[i] : 0;
  }
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row, bool transposed, Site site) {
  if (offer_row(row, site)) {
    uint32_t rows[kWarp][4];
    for (int lane = 0; lane < kWarp; ++lane) {
      const uint32_t* words = row_of(lane);
      for (int i = 0; i < 4; ++i) rows[lane][i] = words[i];
    }
    hand_over(rows, transposed);
  }
  take_fragment(fragment);
}

template <class To, class From>
To bits_of(From value) {
  static_assert(sizeof(From) <= sizeof(To) && std::is_trivially_copyable_v<From>);
  To bits{};
  std::memcpy(&bits, &value, sizeof(From));
  return bits;
}

template <class T>
T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

// --- launching ---

inline std::string runtime_problem() { return {}; }
inline size_t shared_of_multiprocessor(int) { return emulator::shared_of_multiprocessor(); }
inline size_t shared_of_block(int) { return emulator::shared_of_multiprocessor() - kReservedShared; }
inline int multiprocessors(int) { return 1; }

template <class... Parameters>
int resident_blocks(int, const char*, void (*)(Parameters...), int, size_t shared) {
  return int(emulator::shared_of_multiprocessor() / (shared + kReservedShared));
}

template <class... Parameters, class... Arguments>
void launch(const Launch&, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared, Arguments... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, {arguments...}};
  const auto body = [](const void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    std::apply(call.first, call.second);
  };
  emulator::run(name, grid, threads, shared, body, &call);
}

// --- a block's shared memory ---

class SharedMemory {
 public:
  template <class T>
  T* take(size_t count, emulator::Site site = emulator::Site::here()) {
    return static_cast<T*>(emulator::take(taken_++, count * sizeof(T), site));
  }

 private:
  int taken_ = 0;
};

// --- barriers ---

inline void sync_block(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
inline void sync_warp(emulator::Site site = emulator::Site::here()) { emulator::warp_barrier(site); }
inline void sync_group(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::group_barrier(id, threads, site);
}

// --- exchange within a warp ---

inline int lane_index() { return int(threadIdx.x) % kWarp; }

template <class T>
T shuffle(T value, int lane, unsigned mask = kFullWarp, emulator::Site site = emulator::Site::here()) {
  const uint64_t bits = emulator::bits_of<uint64_t>(value);
  return emulator::value_of<T>(emulator::exchange("shuffle", bits, lane & (kWarp - 1), mask, site));
}
template <class T>
T shuffle_xor(T value, int lanes, unsigned mask = kFullWarp, emulator::Site site = emulator::Site::here()) {
  const uint64_t bits = emulator::bits_of<uint64_t>(value);
  const int source = lane_index() ^ (lanes & (kWarp - 1));
  return emulator::value_of<T>(emulator::exchange("shuffle_xor", bits, source, mask, site));
}
template <class T>
T shuffle_up(T value, int lanes, unsigned mask = kFullWarp, emulator::Site site = emulator::Site::here()) {
  const uint64_t bits = emulator::bits_of<uint64_t>(value);
  const int source = lane_index() < lanes ? lane_index() : lane_index() - lanes;
  return emulator::value_of<T>(emulator::exchange("shuffle_up", bits, source, mask, site));
}
inline unsigned ballot(bool predicate, unsigned mask = kFullWarp,
                       emulator::Site site = emulator::Site::here()) {
  return emulator::vote(predicate, mask, site);
}

// --- integer atomics ---

inline int atomic_add(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// --- asynchronous copies ---

inline void cp_async_16(void* shared, const void* global, int bytes,
                        emulator::Site site = emulator::Site::here()) {
  emulator::start_copy({shared, global, 16, bytes, site});
}
inline void cp_async_4(void* shared, const void* global, int bytes,
                       emulator::Site site = emulator::Site::here()) {
  emulator::start_copy({shared, global, 4, bytes, site});
}
inline void cp_async_commit() { emulator::commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::finish_copies(kPending);
}

// --- tensor cores ---

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                        emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices(fragment, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row,
                              emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices(fragment, row, true, site);
}

// The products are added one by one, in fp32, in the order of k; or as PXC_EMULATOR_SUMS says. (A device has
// its own order.)
template <class T>
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
         emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  constexpr emulator::Operands kOperands =
      std::is_same_v<T, Half> ? emulator::Operands::kHalf : emulator::Operands::kBFloat16;
  emulator::multiply(kOperands, sum, a, b0, b1, site);
}

// --- arithmetic ---

inline uint32_t float_bits(float value) { return emulator::bits_of<uint32_t>(value); }
inline float bits_float(uint32_t bits) { return emulator::bits_of<float>(bits); }

inline float exp2_approx(float value) {
  const float result = exp2f(value);
  return result < 0x1p-126f ? 0.0f : result;
}

inline float rounded_product(float a, float b) { return a * b; }  // compiled without contraction

inline float reciprocal_approx(float value) { return 1.f / value; }

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int lowest_bit(unsigned bits) { return __builtin_ffs(int(bits)) - 1; }

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
inline float to_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;  // the exponents' biases are 15 and 127
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(float_bits(scaled) | special | uint32_t(value.bits & 0x8000u) << 16);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Half from_float<Half>(float value) {
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u, magnitude = float_bits(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 2^16 and more
  if (magnitude <
      0x38800000u) {  // less than 2^-14: the sum's rounding leaves multiples of 2^-24 in its low bits
    return {uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

}  // namespace pxc
