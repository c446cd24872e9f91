// Runs CUDA kernels on a CPU: see emulator.h for what it checks.
//
// Every thread of a block is a fiber, with a stack of its own, that runs until it has to wait; then it
// switches to the next that can go on. A fiber never runs at the same time as another, so nothing here needs
// a lock but the launch. Compiled without ThreadSanitizer, which so sees the kernels' accesses to memory and,
// through the tags of barriers, their order, but not the emulator's own.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "portable.h"

#if !defined(__x86_64__) && !defined(PXC_EMULATOR_UCONTEXT)
#define PXC_EMULATOR_UCONTEXT 1  // slower: it makes system calls
#endif
#if PXC_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

// What the sanitizers want to be told. Null in a process without them.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pxc::emulator {
namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp, kMaxBarriers = 16;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on any device
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kStackSize = 256 << 10;

// --- contexts: a stack and the registers that a call preserves ---

#if !PXC_EMULATOR_UCONTEXT

struct Context {
  void* stack_pointer;
};

extern "C" void pxc_emulator_switch(Context* from, const Context* to);
asm(R"(
.text
.type pxc_emulator_switch, @function
.hidden pxc_emulator_switch
.globl pxc_emulator_switch
pxc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pxc_emulator_switch, .-pxc_emulator_switch
)");

void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // the entry's return address, where an unwinder stops
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, const Context& to) { pxc_emulator_switch(&from, &to); }

#else

using Context = ucontext_t;

void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

#endif

// --- state ---

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kExited };

struct PendingCopy {
  Copy copy;
  int group;  // how many groups were committed before it
};

struct Fiber {
  Context context;
  char* stack;
  size_t stack_size;
  void* tsan[2] = {};          // ThreadSanitizer's, one for either set of blocks
  void* fake_stack = nullptr;  // AddressSanitizer's

  int index;
  State state;
  const char* what;  // it waits in, and where
  Site site;
  int barrier;
  unsigned mask;

  // What the lane brings to a collective of its warp, and what it takes from there.
  uint64_t value;
  int source;
  const void* row;
  uint32_t words[10];

  std::deque<PendingCopy> copies;
  int committed;

  int warp() const { return index / kWarp; }
  int lane() const { return index % kWarp; }
};

struct Warp {
  unsigned waiting = 0, exited = 0;  // lanes
  bool phase = false;
};

struct Barrier {
  int arrived = 0, expected = 0;
  int first = 0;  // the thread that came first
  bool phase = false;
};

struct SharedArray {
  void* memory;
  size_t bytes;
  Site site;
};

// What ThreadSanitizer knows barriers by: two each, used in turn, since the first thread may reach a barrier
// again before the last one has left it. A block has its own, or it would seem to wait for the one before.
struct Tags {
  uint64_t barriers[kMaxBarriers][2], warps[kMaxWarps][2];
};

enum class Order { kForward, kReverse, kRandom };

// The one launch that is running.
struct Machine {
  const char* kernel;
  int threads;
  size_t shared;
  Body body;
  const void* arguments;

  bool truncates;  // the sums of mma
  Order order;
  std::mt19937 random;
  std::vector<int> turns;  // the threads in the order they are looked at
  int turn;

  Fiber fibers[kMaxThreads];
  bool ready[kMaxThreads];
  Fiber* current;
  int running;  // threads that have not exited
  Warp warps[kMaxWarps];
  Barrier barriers[kMaxBarriers];
  std::vector<SharedArray> arrays;
  size_t shared_used;
  std::unique_ptr<Tags> tags;
  uint64_t start_tag, end_tag;
  int block_set;
  char failure[2048];

  char* stacks = nullptr;
  char* shared_region = nullptr;  // under ThreadSanitizer
  Context main;
  void* main_tsan;
  void* main_fake_stack;
  const void* main_stack;
  size_t main_stack_size;
  bool from_main;
};

Machine machine;
std::mutex one_launch;

bool under_tsan() { return __tsan_create_fiber != nullptr; }
void acquire(uint64_t& tag) {
  if (__tsan_acquire) __tsan_acquire(&tag);
}
void release(uint64_t& tag) {
  if (__tsan_release) __tsan_release(&tag);
}

// ThreadSanitizer sees calls of the C library from here too. While one of these lives, it looks away.
class Unseen {
 public:
  Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!AnnotateIgnoreReadsEnd) return;
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// --- switching ---

Fiber* next_ready() {
  for (int step = 0; step < 2 * machine.threads; ++step) {
    if (++machine.turn >= machine.threads) {
      machine.turn = 0;
      if (machine.order == Order::kRandom) {
        std::shuffle(machine.turns.begin(), machine.turns.end(), machine.random);
      }
    }
    const int thread = machine.turns[machine.turn];
    if (machine.ready[thread]) return &machine.fibers[thread];
  }
  return nullptr;
}

// Comes back when `from` is switched to again; without a fake stack to keep, it never is.
void enter(Context& from, void** fake_stack, Fiber& fiber) {
  machine.current = &fiber;
  threadIdx.x = unsigned(fiber.index);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fake_stack, fiber.stack, fiber.stack_size);
  }
  if (under_tsan()) __tsan_switch_to_fiber(fiber.tsan[machine.block_set], 1);  // 1: it orders nothing
  switch_context(from, fiber.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(*fake_stack, nullptr, nullptr);
}

[[noreturn]] void leave_for_main() {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(nullptr, machine.main_stack, machine.main_stack_size);
  }
  if (under_tsan()) __tsan_switch_to_fiber(machine.main_tsan, 1);
  switch_context(machine.current->context, machine.main);
  std::abort();
}

// --- failures ---

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool operator!=(const Site& a, const Site& b) {
  return a.line != b.line || (a.file != b.file && std::strcmp(a.file, b.file) != 0);
}

// Ends the launch: its fibers are left as they are, and `run` throws.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  {
    const Unseen unseen;
    const int length = std::snprintf(machine.failure, sizeof machine.failure,
                                     "%s: block (%u, %u, %u), thread %d: ", machine.kernel, blockIdx.x,
                                     blockIdx.y, blockIdx.z, machine.current->index);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(machine.failure + length, sizeof machine.failure - size_t(length), format, arguments);
    va_end(arguments);
  }
  leave_for_main();
}

// Where everyone is, for a deadlock's message: "threads 0-31 wait in sync_block at a.cuh:7; thread 32 has
// exited".
void describe_threads(char* text, size_t size) {
  const auto same = [](const Fiber& a, const Fiber& b) {
    if (a.state != b.state) return false;
    return a.state == State::kExited || (a.what == b.what && a.barrier == b.barrier && !(a.site != b.site));
  };
  size_t used = 0;
  const auto add = [&](const char* format, auto... values) {
    if (used < size) used += size_t(std::snprintf(text + used, size - used, format, values...));
  };
  for (int first = 0, end = 0; first < machine.threads; first = end) {
    const Fiber& fiber = machine.fibers[first];
    while (end < machine.threads && same(fiber, machine.fibers[end])) ++end;
    add("%s%s %d", first ? "; " : "", end - first > 1 ? "threads" : "thread", first);
    if (end - first > 1) add("-%d", end - 1);
    if (fiber.state == State::kExited) {
      add(" exited");
    } else {
      add(" in %s", fiber.what);
      if (fiber.state == State::kAtBarrier && fiber.barrier) add("(%d)", fiber.barrier);
      add(" at %s:%d", base_name(fiber.site.file), fiber.site.line);
    }
  }
}

[[noreturn]] void deadlock() {
  static char where[1500];
  {
    const Unseen unseen;
    describe_threads(where, sizeof where);
  }
  fail("deadlock: %s", where);
}

// --- a thread's life ---

void wait(State state) {
  Fiber& me = *machine.current;
  me.state = state;
  machine.ready[me.index] = false;
  Fiber* other = next_ready();
  if (!other) deadlock();
  enter(me.context, &me.fake_stack, *other);
}

void wake(Fiber& fiber) {
  fiber.state = State::kReady;
  machine.ready[fiber.index] = true;
}

void run_thread() {
  if (__sanitizer_finish_switch_fiber) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (machine.from_main) machine.main_stack = stack, machine.main_stack_size = size;
  }
  machine.from_main = false;
  acquire(machine.start_tag);

  char thrown[256] = "";
  try {
    machine.body(machine.arguments);
  } catch (const std::exception& error) {
    std::snprintf(thrown, sizeof thrown, "%s", error.what());
  }
  if (thrown[0]) fail("threw an exception: %s", thrown);
  Fiber& me = *machine.current;
  if (!me.copies.empty()) {
    const Site site = me.copies.front().copy.site;
    fail("the kernel ends with a cp.async in flight, of %s:%d", base_name(site.file), site.line);
  }
  release(machine.end_tag);

  me.state = State::kExited;
  machine.ready[me.index] = false;
  machine.warps[me.warp()].exited |= 1u << me.lane();
  if (--machine.running == 0) leave_for_main();
  Fiber* other = next_ready();
  if (!other) deadlock();
  enter(me.context, nullptr, *other);
  std::abort();
}

// --- launches ---

template <class... Values>
[[noreturn]] void refuse(const char* kernel, const char* format, Values... values) {
  char text[512];
  std::snprintf(text, sizeof text, format, values...);
  throw std::runtime_error(std::string(kernel) + ": " + text);
}

void set_schedule() {
  const char* text = std::getenv("PXC_EMULATOR_SCHEDULE");
  const std::string schedule = text && *text ? text : "forward";
  machine.order = schedule == "forward"   ? Order::kForward
                  : schedule == "reverse" ? Order::kReverse
                                          : Order::kRandom;
  if (machine.order != Order::kRandom) return;
  char* end;
  const unsigned long seed = std::strtoul(schedule.c_str(), &end, 10);
  if (*end)
    throw std::runtime_error("PXC_EMULATOR_SCHEDULE is \"forward\", \"reverse\" or a number, not " +
                             schedule);
  machine.random.seed(unsigned(seed));
}

void set_rounding() {
  const char* text = std::getenv("PXC_EMULATOR_SUMS");
  const std::string sums = text && *text ? text : "nearest";
  if (sums != "nearest" && sums != "truncated") {
    throw std::runtime_error("PXC_EMULATOR_SUMS is \"nearest\" or \"truncated\", not " + sums);
  }
  machine.truncates = sums == "truncated";
}

template <class Index>
std::vector<Index> in_order(size_t count) {
  std::vector<Index> indices(count);
  std::iota(indices.begin(), indices.end(), Index(0));
  if (machine.order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  if (machine.order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), machine.random);
  return indices;
}

char* map_memory(size_t size, void* at = nullptr) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = mmap(at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the emulator");
  return static_cast<char*>(memory);
}

void set_up_memory() {
  if (machine.stacks) return;
  machine.stacks = map_memory(kMaxThreads * kStackSize);
  for (int i = 0; i < kMaxThreads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.index = i;
    fiber.stack = machine.stacks + i * kStackSize;
    // Stacks that began at like addresses would fight for the same lines of the cache.
    fiber.stack_size = kStackSize - size_t(i) * 1088 % 32768;
    if (!under_tsan()) mprotect(fiber.stack, 4096, PROT_NONE);
  }
  if (under_tsan()) machine.shared_region = map_memory(kMaxShared);
}

void start_block() {
  std::fill_n(machine.warps, kMaxWarps, Warp{});
  std::fill_n(machine.barriers, kMaxBarriers, Barrier{});
  machine.shared_used = 0;
  machine.running = machine.threads;
  machine.turns = in_order<int>(size_t(machine.threads));
  machine.turn = -1;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    wake(fiber);
    fiber.copies.clear();
    fiber.committed = 0;
    fiber.fake_stack = nullptr;
    prepare(fiber.context, fiber.stack, fiber.stack_size, run_thread);
  }
}

// To ThreadSanitizer, blocks next to each other in the grid are different threads, which nothing orders. (It
// takes too long to make new ones for every block.) Memory that blocks use in turn is mapped anew, and so
// forgotten.
void start_block_under_tsan() {
  if (!under_tsan()) return;
  machine.block_set = int((blockIdx.x + blockIdx.y + blockIdx.z) % 2);
  machine.tags = std::make_unique<Tags>();
  map_memory(size_t(machine.threads) * kStackSize, machine.stacks);
  map_memory(kMaxShared, machine.shared_region);
  std::memset(machine.shared_region, 0xff, machine.shared);
  for (int i = 0; i < machine.threads; ++i) {
    void*& fiber = machine.fibers[i].tsan[machine.block_set];
    if (!fiber) fiber = __tsan_create_fiber(0);
  }
  release(machine.start_tag);
}

void end_block() {
  for (const SharedArray& array : machine.arrays) {
    if (!under_tsan()) std::free(array.memory);
  }
  machine.arrays.clear();
}

// After a failure: what the sanitizers think of the calls that were left halfway.
void forget_abandoned_calls() {
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, fiber.stack_size);
    void*& tsan = fiber.tsan[machine.block_set];
    if (tsan) __tsan_destroy_fiber(tsan);
    tsan = nullptr;
  }
}

// --- collectives of a warp ---

// True for the last lane of `mask` to come: it does the work of all, then calls `disperse`. The others wait
// for that.
bool gather_warp(const char* what, unsigned mask, Site site) {
  Fiber& me = *machine.current;
  Warp& warp = machine.warps[me.warp()];
  Fiber* lanes = machine.fibers + me.warp() * kWarp;
  if (!(mask >> me.lane() & 1)) {
    fail("%s at %s:%d has the mask %08x, without the caller, lane %d", what, base_name(site.file), site.line,
         mask, me.lane());
  }
  if (mask & warp.exited) {
    fail("%s at %s:%d has the mask %08x, but lane %d has exited", what, base_name(site.file), site.line, mask,
         __builtin_ctz(mask & warp.exited));
  }
  const unsigned waiting = mask & warp.waiting;
  const auto check = [&](const Fiber& other) {
    const bool same = other.mask == mask && other.what == what && !(other.site != site);
    if (!same && other.mask >> me.lane() & 1) {
      fail("%s at %s:%d with the mask %08x, while lane %d is in %s at %s:%d with the mask %08x", what,
           base_name(site.file), site.line, mask, other.lane(), other.what, base_name(other.site.file),
           other.site.line, other.mask);
    }
    return same;
  };
  if (waiting) check(lanes[__builtin_ctz(waiting)]);
  me.what = what, me.site = site, me.mask = mask, me.barrier = 0;
  bool last = (waiting | 1u << me.lane()) == mask;
  for (unsigned rest = last ? waiting : 0; rest; rest &= rest - 1) last &= check(lanes[__builtin_ctz(rest)]);
  if (last) return true;
  warp.waiting |= 1u << me.lane();
  wait(State::kInWarp);
  return false;
}

void disperse_warp() {
  const Fiber& me = *machine.current;
  Warp& warp = machine.warps[me.warp()];
  for (unsigned rest = me.mask & ~(1u << me.lane()); rest; rest &= rest - 1) {
    wake(machine.fibers[me.warp() * kWarp + __builtin_ctz(rest)]);
  }
  warp.waiting &= ~me.mask;
}

Fiber* my_warp() { return machine.fibers + machine.current->warp() * kWarp; }

// --- barriers of a block ---

void arrive(int id, int expected, const char* what, Site site) {
  Fiber& me = *machine.current;
  Barrier& barrier = machine.barriers[id];
  const unsigned exited = machine.warps[me.warp()].exited;
  if (id == 0 && machine.running < machine.threads) {
    int gone = 0;
    while (machine.fibers[gone].state != State::kExited) ++gone;
    fail("%s at %s:%d, but thread %d has exited", what, base_name(site.file), site.line, gone);
  }
  if (exited)
    fail("%s at %s:%d, but lane %d of its warp has exited", what, base_name(site.file), site.line,
         __builtin_ctz(exited));
  const Fiber* warp = my_warp();
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& other = warp[lane];
    if (other.state == State::kAtBarrier && (other.barrier != id || other.site != site)) {
      fail("%s at %s:%d, while lane %d of its warp is in %s at %s:%d", what, base_name(site.file), site.line,
           lane, other.what, base_name(other.site.file), other.site.line);
    }
  }
  if (barrier.arrived > 0) {
    const Fiber& first = machine.fibers[barrier.first];
    if (barrier.expected != expected) {
      fail("%s(%d, %d) at %s:%d, while thread %d waits there for %d threads, at %s:%d", what, id, expected,
           base_name(site.file), site.line, first.index, barrier.expected, base_name(first.site.file),
           first.site.line);
    }
    if (id == 0 && first.site != site) {
      fail("%s at %s:%d, while thread %d is in %s at %s:%d", what, base_name(site.file), site.line,
           first.index, first.what, base_name(first.site.file), first.site.line);
    }
  } else {
    barrier.expected = expected;
    barrier.first = me.index;
  }

  me.what = what, me.site = site, me.barrier = id;
  const bool phase = barrier.phase;
  if (machine.tags) release(machine.tags->barriers[id][phase]);
  if (++barrier.arrived < expected) {
    wait(State::kAtBarrier);
  } else {
    const auto is_here = [&](const Fiber& fiber) {
      return &fiber == &me || (fiber.state == State::kAtBarrier && fiber.barrier == id);
    };
    for (int i = 0; i < machine.threads; ++i) {
      if (is_here(machine.fibers[i]) != is_here(machine.fibers[i / kWarp * kWarp])) {
        fail("%s(%d, %d) at %s:%d is reached by a part of warp %d only", what, id, expected,
             base_name(site.file), site.line, i / kWarp);
      }
    }
    for (int i = 0; i < machine.threads; ++i) {
      if (is_here(machine.fibers[i])) wake(machine.fibers[i]);
    }
    barrier.arrived = 0;
    barrier.phase = !phase;
  }
  if (machine.tags) acquire(machine.tags->barriers[id][phase]);
}

// --- shared memory ---

void check_shared(const char* what, const void* pointer, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail("%s at %s:%d: the shared address %p is misaligned for %zu bytes", what, base_name(site.file),
         site.line, pointer, bytes);
  }
  for (const SharedArray& array : machine.arrays) {
    const char* begin = static_cast<const char*>(array.memory);
    const char* address = static_cast<const char*>(pointer);
    if (address >= begin && address + bytes <= begin + array.bytes) return;
  }
  fail("%s at %s:%d: %p is not in an array of shared memory", what, base_name(site.file), site.line, pointer);
}

// --- products of matrices ---

template <Operands kOperands>
float widen(uint32_t bits) {
  if constexpr (kOperands == Operands::kHalf) return to_float(Half{uint16_t(bits)});
  return bits_float(bits << 16);
}

float toward_zero(double value) {
  const float nearest = float(value);
  return std::fabs(double(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.f) : nearest;
}

// Lanes hold words of two numbers of 16 bits: a word of `a` in row lane / 4 (+ 8) and word lane % 4 (+ 4) of
// the row, one of `b` in column lane / 4 and word lane % 4 (+ 4) of the column.
template <Operands kOperands>
void multiply_warp(Fiber* lanes) {
  constexpr int kInWord = 2, kDepth = 8 * kInWord;
  float a[16][kDepth], b[kDepth][8], sum[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* words = lanes[lane].words;
    const int row = lane / 4, word = lane % 4;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&sum[row + i / 2 * 8][2 * word + i % 2], &words[i], sizeof(float));
      for (int part = 0; part < kInWord; ++part) {
        const int k = (word + i / 2 * 4) * kInWord + part;
        a[row + i % 2 * 8][k] = widen<kOperands>(words[4 + i] >> 16 * part);
        if (i % 2 == 0) b[k][row] = widen<kOperands>(words[8 + i / 2] >> 16 * part);
      }
    }
  }
  if (machine.truncates) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double exact = sum[row][column];
        for (int k = 0; k < kDepth; ++k) exact += double(a[row][k]) * double(b[k][column]);
        sum[row][column] = toward_zero(exact);
      }
    }
  } else {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&lanes[lane].words[i], &sum[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2], sizeof(float));
    }
  }
}

}  // namespace

size_t shared_of_multiprocessor() {
  const char* text = std::getenv("PXC_EMULATOR_SHARED");
  if (!text || !*text) return kMaxShared + kReservedShared;
  char* end;
  const unsigned long kilobytes = std::strtoul(text, &end, 10);
  if (*end || kilobytes < 100 || kilobytes > 228) {
    throw std::runtime_error(std::string("PXC_EMULATOR_SHARED is 100 to 228, not ") + text);
  }
  return kilobytes * 1024;
}

void run(const char* name, dim3 grid, int threads, size_t shared, Body body, const void* arguments) {
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  if (threads <= 0 || threads > kMaxThreads || threads % kWarp) {
    refuse(name, "a block has 1 to %d whole warps, not %d threads", kMaxWarps, threads);
  }
  if (grid.x > 0x7fffffffu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    refuse(name, "a grid of (%u, %u, %u) blocks is too large: y and z go to %u", grid.x, grid.y, grid.z,
           kMaxGridYZ);
  }
  if (const size_t most = shared_of_multiprocessor() - kReservedShared; shared > most) {
    refuse(name, "a block can have %zu bytes of shared memory, not %zu", most, shared);
  }

  const std::lock_guard<std::mutex> lock(one_launch);
  set_schedule();
  set_rounding();
  set_up_memory();
  machine.kernel = name;
  machine.threads = threads;
  machine.shared = shared;
  machine.body = body;
  machine.arguments = arguments;
  machine.failure[0] = '\0';
  machine.main_tsan = under_tsan() ? __tsan_get_current_fiber() : nullptr;
  blockDim = dim3(unsigned(threads));
  gridDim = grid;
  for (const size_t block : in_order<size_t>(blocks)) {
    blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                unsigned(block / grid.x / grid.y)};
    start_block_under_tsan();
    start_block();
    machine.from_main = true;
    enter(machine.main, &machine.main_fake_stack, *next_ready());
    end_block();
    if (machine.failure[0]) {
      forget_abandoned_calls();
      throw std::runtime_error(machine.failure);
    }
  }
  acquire(machine.end_tag);
}

void* take(int index, size_t bytes, Site site) {
  if (size_t(index) < machine.arrays.size()) {
    const SharedArray& array = machine.arrays[size_t(index)];
    if (array.bytes != bytes) {
      fail("takes %zu bytes at %s:%d as its shared array %d, another thread %zu bytes at %s:%d", bytes,
           base_name(site.file), site.line, index, array.bytes, base_name(array.site.file), array.site.line);
    }
    return array.memory;
  }
  const size_t begin = machine.shared_used;
  machine.shared_used += shared_bytes<char>(bytes);
  if (machine.shared_used > machine.shared) {
    fail("%zu bytes of shared memory at %s:%d make %zu in all, but the launch asked for %zu", bytes,
         base_name(site.file), site.line, machine.shared_used, machine.shared);
  }
  void* memory = machine.shared_region + begin;
  if (!under_tsan()) {
    if (posix_memalign(&memory, 16, bytes)) fail("no memory for the emulator");
    std::memset(memory, 0xff, bytes);
  }
  const Unseen unseen;
  machine.arrays.push_back({memory, bytes, site});
  return memory;
}

void block_barrier(Site site) { arrive(0, machine.threads, "sync_block", site); }

void group_barrier(int id, int threads, Site site) {
  if (id < 1 || id >= kMaxBarriers || threads <= 0 || threads > machine.threads || threads % kWarp) {
    fail("sync_group(%d, %d) at %s:%d: an id is 1 to %d, and the threads whole warps of a block of %d", id,
         threads, base_name(site.file), site.line, kMaxBarriers - 1, machine.threads);
  }
  arrive(id, threads, "sync_group", site);
}

void warp_barrier(Site site) {
  Warp& warp = machine.warps[machine.current->warp()];
  const int index = machine.current->warp();
  const bool phase = warp.phase;
  if (machine.tags) release(machine.tags->warps[index][phase]);
  if (gather_warp("sync_warp", kFullWarp, site)) {
    warp.phase = !phase;
    disperse_warp();
  }
  if (machine.tags) acquire(machine.tags->warps[index][phase]);
}

uint64_t exchange(const char* what, uint64_t value, int source, unsigned mask, Site site) {
  Fiber& me = *machine.current;
  if (source < 0 || source >= kWarp || !(mask >> source & 1)) {
    fail("%s at %s:%d reads lane %d, outside of the mask %08x", what, base_name(site.file), site.line, source,
         mask);
  }
  me.value = value;
  me.source = source;
  if (gather_warp(what, mask, site)) {
    Fiber* lanes = my_warp();
    uint64_t values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = lanes[lane].value;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Fiber& lane = lanes[__builtin_ctz(rest)];
      lane.value = values[lane.source];
    }
    disperse_warp();
  }
  return me.value;
}

unsigned vote(bool predicate, unsigned mask, Site site) {
  Fiber& me = *machine.current;
  me.value = predicate;
  if (gather_warp("ballot", mask, site)) {
    Fiber* lanes = my_warp();
    unsigned votes = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      votes |= unsigned(lanes[__builtin_ctz(rest)].value) << __builtin_ctz(rest);
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].value = votes;
    disperse_warp();
  }
  return unsigned(me.value);
}

void multiply(Operands operands, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Site site) {
  static const char* const names[] = {"mma<Half>", "mma<BFloat16>"};
  Fiber& me = *machine.current;
  std::memcpy(me.words, sum, sizeof sum);
  std::memcpy(me.words + 4, a, sizeof a);
  me.words[8] = b0;
  me.words[9] = b1;
  if (gather_warp(names[int(operands)], kFullWarp, site)) {
    Fiber* lanes = my_warp();
    switch (operands) {
      case Operands::kHalf:
        multiply_warp<Operands::kHalf>(lanes);
        break;
      case Operands::kBFloat16:
        multiply_warp<Operands::kBFloat16>(lanes);
        break;
    }
    disperse_warp();
  }
  std::memcpy(sum, me.words, sizeof sum);
}

bool offer_row(const void* row, Site site) {
  check_shared("ldmatrix", row, 16, site);
  machine.current->row = row;
  return gather_warp("ldmatrix", kFullWarp, site);
}

const uint32_t* row_of(int lane) { return static_cast<const uint32_t*>(my_warp()[lane].row); }

void hand_over(const uint32_t (&rows)[kWarp][4], bool transposed) {
  Fiber* lanes = my_warp();
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint32_t (*matrix_rows)[4] = rows + 8 * matrix;
      uint32_t word = matrix_rows[lane / 4][lane % 4];
      if (transposed) {
        const int first_row = 2 * (lane % 4), column = lane / 4, shift = 16 * (column % 2);
        const uint32_t low = matrix_rows[first_row][column / 2] >> shift & 0xffffu;
        const uint32_t high = matrix_rows[first_row + 1][column / 2] >> shift & 0xffffu;
        word = low | high << 16;
      }
      lanes[lane].words[matrix] = word;
    }
  }
  disperse_warp();
}

void take_fragment(uint32_t (&fragment)[4]) {
  std::memcpy(fragment, machine.current->words, sizeof fragment);
}

void issue(const Copy& copy) {
  if (copy.bytes != 0 && copy.bytes != copy.size) {
    fail("cp_async_%d at %s:%d copies 0 or %d bytes, not %d", copy.size, base_name(copy.site.file),
         copy.site.line, copy.size, copy.bytes);
  }
  check_shared(copy.size == 16 ? "cp_async_16" : "cp_async_4", copy.shared, size_t(copy.size), copy.site);
  if (reinterpret_cast<uintptr_t>(copy.global) % unsigned(copy.size)) {
    fail("cp_async_%d at %s:%d: the global address %p is misaligned", copy.size, base_name(copy.site.file),
         copy.site.line, copy.global);
  }
  const Unseen unseen;
  machine.current->copies.push_back({copy, machine.current->committed});
}

void commit() { ++machine.current->committed; }

bool due(int pending, Copy& copy) {
  Fiber& me = *machine.current;
  if (me.copies.empty() || me.copies.front().group + pending >= me.committed) return false;
  const Unseen unseen;
  copy = me.copies.front().copy;
  me.copies.pop_front();
  return true;
}

}  // namespace pxc::emulator
