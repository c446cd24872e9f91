// Kernels that use one function of portable.h each, right and wrong. The right ones show what a fragment, a
// copy or a shuffle is, on the emulator and, compiled by nvcc, on a device; the wrong ones show that the
// emulator finds them. test_emulator.py has the expectations.
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "portable.h"

namespace pxc {
namespace {

// --- right ---

// Fragments as the lanes hold them: a [32, 4], b [32, 2], sum [32, 4] in and out.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* sum) {
  const int lane = threadIdx.x;
  uint32_t a_fragment[4];
  float sum_fragment[4];
  for (int i = 0; i < 4; ++i) {
    a_fragment[i] = a[lane * 4 + i];
    sum_fragment[i] = sum[lane * 4 + i];
  }
  mma<T>(sum_fragment, a_fragment, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) sum[lane * 4 + i] = sum_fragment[i];
}

// rows [32, 4], fragments [32, 4]
__global__ void ldmatrix_kernel(const uint32_t* rows, int transposed, uint32_t* fragments) {
  SharedMemory memory;
  uint32_t* shared = memory.take<uint32_t>(kWarp * 4);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) shared[lane * 4 + i] = rows[lane * 4 + i];
  sync_warp();
  uint32_t fragment[4];
  if (transposed) {
    ldmatrix_x4_trans(fragment, shared + lane * 4);
  } else {
    ldmatrix_x4(fragment, shared + lane * 4);
  }
  for (int i = 0; i < 4; ++i) fragments[lane * 4 + i] = fragment[i];
}

// Copies `size` of `rows * 4` words through two buffers that are filled in turn; what is behind `size` comes
// as zeros.
__global__ void cp_async_kernel(const uint32_t* source, int size, int rows, uint32_t* target) {
  SharedMemory memory;
  uint32_t* buffers[2] = {memory.take<uint32_t>(kWarp * 4), memory.take<uint32_t>(kWarp * 4)};
  const int lane = threadIdx.x, chunks = (rows + kWarp - 1) / kWarp;
  const auto fetch = [&](int chunk) {
    const int row = chunk * kWarp + lane, first = row * 4;
    uint32_t* to = buffers[chunk % 2] + lane * 4;
    if (chunk < chunks && row < rows) {
      if (first + 4 <= size) {
        cp_async_16(to, source + first, 16);
      } else {
        for (int i = 0; i < 4; ++i) {
          const bool inside = first + i < size;
          cp_async_4(to + i, inside ? source + first + i : source, inside ? 4 : 0);
        }
      }
    }
    cp_async_commit();
  };
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    fetch(chunk + 1);
    cp_async_wait<1>();
    sync_warp();
    // By another lane than the one that copied.
    const int row = chunk * kWarp + kWarp - 1 - lane;
    for (int i = 0; i < 4 && row < rows; ++i)
      target[row * 4 + i] = buffers[chunk % 2][(kWarp - 1 - lane) * 4 + i];
    sync_warp();
  }
  cp_async_wait<0>();
}

// A copy of 16 bytes of which none are wanted; the address is never read.
__global__ void zero_fill_kernel(uint32_t* target) {
  SharedMemory memory;
  uint32_t* shared = memory.take<uint32_t>(kWarp * 4);
  cp_async_16(shared + threadIdx.x * 4, nullptr, 0);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) target[threadIdx.x * 4 + i] = shared[threadIdx.x * 4 + i];
}

// values [64] -> results [64, 6]
__global__ void exchange_kernel(const float* values, float* results) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  float* row = results + thread * 6;
  const float value = values[thread];
  row[0] = shuffle(value, (lane * 5 + 3) % kWarp);
  row[1] = shuffle_xor(value, 9);
  row[2] = shuffle_up(value, 3);
  row[3] = float(shuffle(double(value), 31 - lane));
  row[4] = float(ballot(value > 0) % 65536u);
  // Two halves of the warp, each on its own.
  if (lane < 16) {
    row[5] = shuffle_xor(value, 1, 0x0000ffffu);
  } else {
    row[5] = float(ballot(value > 0, 0xffff0000u) >> 16) + shuffle(value, 16, 0xffff0000u);
  }
}

// Pairs of warps turn arrays round, in shared memory, `rounds` times, each pair at its own barrier and pace.
__global__ void group_kernel(const int* values, int rounds, int* results) {
  SharedMemory memory;
  int* shared = memory.take<int>(blockDim.x);
  const int thread = threadIdx.x, group = thread / 64, begin = group * 64;
  shared[thread] = values[thread];
  for (int round = 0; round < rounds + group; ++round) {
    sync_group(1 + group, 64);
    const int other = shared[begin + 63 - (thread - begin)];
    sync_group(1 + group, 64);
    shared[thread] = other + 1;
  }
  sync_block();
  results[thread] = shared[thread];
}

// values [n] -> results [n, 9]
__global__ void arithmetic_kernel(const float* values, int size, uint32_t* results) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float value = values[i];
  uint32_t* row = results + i * 9;
  row[0] = float_bits(rounded_product(value, 0.7f) + rounded_product(-value, 0.7f));
  row[1] = float_bits(exp2_approx(value));
  row[2] = from_float<Half>(value).bits;
  row[3] = from_float<BFloat16>(value).bits;
  row[4] = pack<Half>(value, -value);
  row[5] = pack<BFloat16>(value, -value);
  row[6] = uint32_t(count_bits(float_bits(value)));
  row[7] = uint32_t(lowest_bit(float_bits(value)));
  row[8] = float_bits(max(min(value, 1.0f), -1.0f));
}

// All 65536 of both kinds -> results [65536, 2]
__global__ void widen_kernel(uint32_t* results) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  results[i * 2] = float_bits(to_float(Half{uint16_t(i)}));
  results[i * 2 + 1] = float_bits(to_float(BFloat16{uint16_t(i)}));
}

// Which threads came when: tickets [blocks, threads]
__global__ void ticket_kernel(int* counter, int* tickets) {
  tickets[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] =
      atomic_add(counter, 1);
}

// What a block finds in its shared memory: words [blocks, 32]
__global__ void stale_kernel(uint32_t* words) {
  SharedMemory memory;
  uint32_t* shared = memory.take<uint32_t>(kWarp);
  words[blockIdx.x * kWarp + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 7;
}

// --- wrong ---

__global__ void misuse_kernel(int fault, int* global) {
  SharedMemory memory;
  int* shared = memory.take<int>(256);
  const int thread = threadIdx.x, lane = thread % kWarp;
  uint32_t fragment[4];
  switch (fault) {
    case 0:  // a barrier in two places
      if (thread < 32) {
        sync_block();
      } else {
        sync_block();
      }
      break;
    case 1:  // a barrier after an exit
      if (thread == 5) return;
      sync_block();
      break;
    case 2:  // a barrier before an exit
      if (thread != 63) sync_block();
      break;
    case 3:  // different counts
      sync_group(1, thread < 32 ? 64 : 32);
      break;
    case 4:  // half of each warp
      if (lane < 16) sync_group(1, 32);
      break;
    case 5:  // no such barrier
      sync_group(16, 64);
      break;
    case 6:  // half a warp in another barrier
      sync_group(lane < 16 ? 1 : 2, 64);
      break;
    case 7:  // a shuffle in two places
      if (lane % 2) {
        shared[thread] = shuffle(lane, 0);
      } else {
        shared[thread] = shuffle(lane, 1);
      }
      break;
    case 8:  // a mask without the caller
      shared[thread] = shuffle(lane, 0, 0x0000ffffu);
      break;
    case 9:  // a lane outside of the mask
      if (lane < 16) shared[thread] = shuffle(lane, 16, 0x0000ffffu);
      break;
    case 10:  // a lane that has exited
      if (lane == 3) return;
      shared[thread] = int(ballot(true));
      break;
    case 11:  // a lane that does not come
      if (lane != 3) shared[thread] = shuffle_xor(lane, 1);
      break;
    case 12:  // different masks
      shared[thread] = shuffle(lane, lane, lane < 8 ? 0xffffffffu : 0xffffff00u);
      break;
    case 13:  // two groups that wait for each other
      sync_group(thread < 32 ? 1 : 2, 64);
      break;
    case 14:
      cp_async_16(shared + thread + 1, global, 16);
      break;
    case 15:
      cp_async_16(shared + thread * 4, global + 1, 16);
      break;
    case 16:
      cp_async_4(global, global, 4);
      break;
    case 17:
      cp_async_16(shared + thread * 4, global, 8);
      break;
    case 18:  // no wait
      cp_async_16(shared + thread * 4, global, 16);
      cp_async_commit();
      break;
    case 19:  // no commit
      cp_async_16(shared + thread * 4, global, 16);
      cp_async_wait<0>();
      break;
    case 20:
      ldmatrix_x4(fragment, shared + lane * 4 + 2);
      break;
    case 21:
      ldmatrix_x4_trans(fragment, global);
      break;
    case 22:
      ldmatrix_x4(fragment, shared + 256);
      break;
    case 23:
      memory.take<int>(1);
      break;
    case 24:
      memory.take<int>(thread < 32 ? 0 : 1);
      break;
    case 25:  // half a warp in a product, half in a barrier
      if (lane < 16) {
        float sum[4] = {};
        mma<Half>(sum, fragment, 0, 0);
      } else {
        sync_warp();
      }
      break;
    case 26:  // a warp in a collective, the others at a barrier
      if (thread == 0) sync_warp();
      if (thread != 0) sync_block();
      break;
    case 27:
#ifndef __CUDACC__
      throw std::runtime_error("of a kernel");
#endif
    default:
      break;
  }
  global[0] = 1;
}

// Faults that leave the numbers right, or not, and are the sanitizers' to find.
__global__ void race_kernel(int fault, int* global) {
  SharedMemory memory;
  int* shared = memory.take<int>(64);
  int* second = memory.take<int>(64);
  const int thread = threadIdx.x;
  shared[thread] = thread;
  second[thread] = thread;
  if (fault != 0) sync_block();  // 0: dropped
  if (fault == 7) shared[64 + thread % 4] = 0;
  int sum = shared[63 - thread] + second[thread ^ 1];
  if (fault == 1) second[thread] = sum;            // while others read it
  if (fault == 2 && thread == 0) global[64] += 1;  // in all blocks
  if (fault == 3) {                                // a shuffle is no barrier
    second[64 - 1 - thread] = sum;
    sum = shuffle_xor(sum, 1);
    sum += second[thread ^ 1];
  }
  if (fault == 4) {  // nor is one of half the block
    second[thread] = sum;
    sync_group(1 + thread / 32, 32);
    sum += second[63 - thread];
  }
  if (fault == 5) {  // copied to where others still read, though the wait comes after a barrier
    if (thread < 16) cp_async_16(shared + thread * 4, global, 16);
    cp_async_commit();
    sync_block();
    cp_async_wait<0>();
  }
  if (fault == 6) {  // read without a barrier after the wait
    sync_block();
    if (thread < 16) cp_async_16(shared + thread * 4, global, 16);
    cp_async_commit();
    cp_async_wait<0>();
    sum += shared[63 - thread];
  }
  if (fault == 8) {  // rows of other lanes
    uint32_t fragment[4];
    sync_block();
    shared[thread] = thread;
    shared[thread ^ 1] = thread;
    ldmatrix_x4(fragment, shared + thread % 16 * 4);
    sum += int(fragment[0]);
  }
  if (fault == 9 && thread == 0) sum += global[65 + blockIdx.x];  // behind the end
  if (fault == 10 && thread == 0) sum += 0x7fffffff;              // overflows
  if (fault == 11) {
    sync_block();
    if (thread < 16) cp_async_16(shared + thread * 4, global + 64 + 4 * thread, 16);  // behind the end
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (blockIdx.x == 0) global[thread] = sum;
}

// --- calls by name ---

struct Call {
  void* const* pointers;
  const int64_t* numbers;
  Launch on;

  template <class T>
  T* pointer(int i) const {
    return static_cast<T*>(pointers[i]);
  }
  int number(int i) const { return int(numbers[i]); }
};

template <class T>
void call_mma(const Call& call) {
  launch(call.on, "mma", mma_kernel<T>, dim3(1), kWarp, 0, call.pointer<uint32_t>(0),
         call.pointer<uint32_t>(1), call.pointer<float>(2));
}

struct Primitive {
  const char* name;
  void (*run)(const Call& call);
};

const Primitive kPrimitives[] = {
    {"mma_half", call_mma<Half>},
    {"mma_bfloat16", call_mma<BFloat16>},
    {"ldmatrix",
     [](const Call& call) {
       launch(call.on, "ldmatrix", ldmatrix_kernel, dim3(1), kWarp, shared_bytes<uint32_t>(kWarp * 4),
              call.pointer<uint32_t>(0), call.number(0), call.pointer<uint32_t>(1));
     }},
    {"cp_async",
     [](const Call& call) {
       launch(call.on, "cp_async", cp_async_kernel, dim3(1), kWarp, 2 * shared_bytes<uint32_t>(kWarp * 4),
              call.pointer<uint32_t>(0), call.number(0), call.number(1), call.pointer<uint32_t>(1));
     }},
    {"zero_fill",
     [](const Call& call) {
       launch(call.on, "zero_fill", zero_fill_kernel, dim3(1), kWarp, shared_bytes<uint32_t>(kWarp * 4),
              call.pointer<uint32_t>(0));
     }},
    {"exchange",
     [](const Call& call) {
       launch(call.on, "exchange", exchange_kernel, dim3(1), 64, 0, call.pointer<float>(0),
              call.pointer<float>(1));
     }},
    {"group",
     [](const Call& call) {
       launch(call.on, "group", group_kernel, dim3(1), 256, shared_bytes<int>(256), call.pointer<int>(0),
              call.number(0), call.pointer<int>(1));
     }},
    {"arithmetic",
     [](const Call& call) {
       const int size = call.number(0);
       launch(call.on, "arithmetic", arithmetic_kernel, dim3(unsigned(size + 127) / 128), 128, 0,
              call.pointer<float>(0), size, call.pointer<uint32_t>(1));
     }},
    {"widen",
     [](const Call& call) {
       launch(call.on, "widen", widen_kernel, dim3(256), 256, 0, call.pointer<uint32_t>(0));
     }},
    {"ticket",
     [](const Call& call) {
       launch(call.on, "ticket", ticket_kernel,
              dim3(unsigned(call.number(0)), unsigned(call.number(1)), unsigned(call.number(2))),
              call.number(3), 0, call.pointer<int>(0), call.pointer<int>(1));
     }},
    {"stale",
     [](const Call& call) {
       launch(call.on, "stale", stale_kernel, dim3(3), kWarp, shared_bytes<uint32_t>(kWarp),
              call.pointer<uint32_t>(0));
     }},
    {"misuse",
     [](const Call& call) {
       launch(call.on, "misuse", misuse_kernel, dim3(2, 3), 64, shared_bytes<int>(256), call.number(0),
              call.pointer<int>(0));
     }},
    {"race",
     [](const Call& call) {
       launch(call.on, "race", race_kernel, dim3(2), 64, 2 * shared_bytes<int>(64), call.number(0),
              call.pointer<int>(0));
     }},
    {"launch",  // of no work, in any shape
     [](const Call& call) {
       launch(call.on, "launch", ticket_kernel,
              dim3(unsigned(call.number(0)), unsigned(call.number(1)), unsigned(call.number(2))),
              call.number(3), size_t(call.number(4)), call.pointer<int>(0), call.pointer<int>(1));
     }},
};

}  // namespace
}  // namespace pxc

// Null, or what went wrong. The text lives until the next call.
extern "C" __attribute__((visibility("default"))) const char* run_primitive(const char* name,
                                                                            void* const* pointers,
                                                                            const int64_t* numbers,
                                                                            int device, uint64_t stream) {
  static std::string message;
  try {
    for (const pxc::Primitive& primitive : pxc::kPrimitives) {
      if (std::strcmp(primitive.name, name) == 0) {
        primitive.run({pointers, numbers, {device, stream}});
        return nullptr;
      }
    }
    message = std::string("no primitive is called ") + name;
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
