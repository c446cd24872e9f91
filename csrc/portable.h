// Everything of CUDA that a kernel may use: built-in variables, __global__ and the like, vectors such as
// float4, min and max, the functions of <cmath>, and those below. nvcc maps them to intrinsics and PTX. Any
// other compiler takes them from emulator/emulator.h, which runs the same kernels on a CPU with one fiber per
// CUDA thread and documents what it checks. Neither side knows anything about contrast.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "params.h"

namespace pxc {

// 16-bit floats as memory holds them. `to_float` widens, `from_float` rounds to nearest, ties to even.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kReservedShared = 1024;  // bytes that a multiprocessor takes for itself of every block's

// Bytes of a block's shared memory that an array of `count` elements takes.
template <class T>
constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

}  // namespace pxc

#ifndef __CUDACC__
#include "emulator/emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pxc {

// --- launching ---

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or the next user of the runtime would see it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

// Why the runtime does not work, for example because the driver is older than it; empty if it works.
inline std::string runtime_problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess) return {};
  cudaGetLastError();
  return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
}

// Bytes of shared memory that a multiprocessor has for its blocks, kReservedShared of each included.
inline size_t shared_of_multiprocessor(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "cudaDeviceGetAttribute");
  return size_t(bytes);
}

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Bytes of shared memory that one block may have.
inline size_t shared_of_block(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return size_t(bytes);
}

// A kernel needs permission to use more than 48 KB of shared memory. This always asks for the maximum, since
// another thread may be about to launch the same kernel with more than this launch needs.
inline void allow_shared(const void* function, const char* name, int device, size_t shared) {
  if (shared <= 48 * 1024) return;
  const int most = int(shared_of_block(device));
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

// How many blocks of a kernel run on a multiprocessor at a time.
template <class... Parameters>
int resident_blocks(int device, const char* name, void (*kernel)(Parameters...), int threads, size_t shared) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, name, device, shared);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared), name);
  return blocks;
}

// Runs kernel(arguments...) on the caller's stream; does nothing for an empty grid. Throws if the launch is
// refused. The caller has made the device current in its own runtime; the runtime linked statically into this
// module has to be told as well.
template <class... Parameters, class... Arguments>
void launch(const Launch& on, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check(cudaSetDevice(on.device), "cudaSetDevice");
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, name, on.device, shared);
  const auto start = [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    check(cudaLaunchKernel(function, grid, dim3(threads), pointers, shared,
                           reinterpret_cast<cudaStream_t>(on.stream)),
          name);
  };
  start(arguments...);
}

// --- a block's shared memory ---

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

// Hands out uninitialised arrays of a block's dynamic shared memory. All threads take the same arrays in the
// same order.
class SharedMemory {
 public:
  template <class T>
  __device__ __forceinline__ T* take(size_t count) {
    T* array = reinterpret_cast<T*>(dynamic_shared_memory + used_);
    used_ += (count * sizeof(T) + 15) / 16 * 16;  // shared_bytes<T>(count)
    return array;
  }

 private:
  size_t used_ = 0;
};

// --- barriers: they order memory among their threads ---

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// For some whole warps of a block, `threads` threads in all. `id` is 1 to 15; barrier 0 is the whole block's.
__device__ __forceinline__ void sync_group(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- exchange within a warp: all lanes of `mask` make the call at the same place. It orders no memory ---

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane, unsigned mask = kFullWarp) {
  return __shfl_sync(mask, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes, unsigned mask = kFullWarp) {
  return __shfl_xor_sync(mask, value, lanes);
}
// The value of the lane `lanes` places before; the first lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int lanes, unsigned mask = kFullWarp) {
  return __shfl_up_sync(mask, value, lanes);
}
__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = kFullWarp) {
  return __ballot_sync(mask, predicate);
}

// --- integer atomics (none for floats: results would depend on the order) ---

__device__ __forceinline__ int atomic_add(int* address, int value) { return atomicAdd(address, value); }

// --- asynchronous copies from global to shared memory ---

// Copies 16 bytes: the first `bytes` (0 or 16) of them from `global`, the rest are zeros. Both pointers are
// aligned. With 0 bytes nothing is read. This thread may use the data after the wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores; a whole warp calls them. Fragments as in the PTX manual, "mma.m16n8k16" ---

// Four 8x8 matrices of 16-bit elements: lane 8i + j points to row j (16 bytes, aligned) of matrix i. Of each
// matrix i, lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, in fragment[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}
// The same with each matrix transposed: lane l gets elements of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8] for T = Half or BFloat16.
template <class T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define PXC_DEFINE_MMA(Type, instruction)                                                                 \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<Type>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,         \
                                            uint32_t b1) {                                                \
    asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
PXC_DEFINE_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
PXC_DEFINE_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef PXC_DEFINE_MMA

// --- arithmetic ---

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// 2^x to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// a * b, rounded. The compiler would fuse a plain product with the sum it enters into an fma, which keeps
// digits that the rounded product of -a and b cannot cancel.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// 1 / x to 1 unit in the last place, for normal x whose reciprocal is normal.
__device__ __forceinline__ float reciprocal_approx(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }
__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(bits) - 1; }  // -1 if there is none

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// Two 16-bit floats in one word, `low` first in memory.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

}  // namespace pxc
#endif
