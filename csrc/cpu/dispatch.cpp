// Which instruction set the vector kernels use.
#include <stdexcept>

#include "cpu.h"

namespace pxc::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const VectorKernels* kernels;
  bool supported;
};

#define PXC_STEPS(isa)                                                                              \
  isa::widen, isa::negatives, isa::positives, isa::count_scores, isa::finish, isa::score_gradients, \
      isa::add_squares, isa::add_groups
#define PXC_FUSED(isa)                                                                  \
  isa::fused_forward, isa::fused_counts, isa::symmetric_forward, isa::symmetric_counts, \
      isa::symmetric_backward
#define PXC_NOT_FUSED nullptr, nullptr, nullptr, nullptr, nullptr
constexpr VectorKernels kPortable = {PXC_STEPS(portable), PXC_NOT_FUSED, false};
#ifdef __x86_64__
constexpr VectorKernels kAvx2 = {PXC_STEPS(avx2), PXC_FUSED(avx2), false};
constexpr VectorKernels kAvx512 = {PXC_STEPS(avx512), PXC_FUSED(avx512), false};
#if PXC_HAVE_AVX512_BF16
constexpr VectorKernels kAvx512Bf16 = {PXC_STEPS(avx512), PXC_FUSED(avx512_bf16), true};
#endif
#endif
#undef PXC_STEPS
#undef PXC_FUSED
#undef PXC_NOT_FUSED

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = {
#ifdef __x86_64__
#if PXC_HAVE_AVX512_BF16
      {"avx512_bf16", &kAvx512Bf16, has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
      {"avx512", &kAvx512, has_avx512()},
      {"avx2", &kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"portable", &kPortable, true},
  };
  return sets;
}

const InstructionSet* best() {
  for (const InstructionSet& set : known()) {
    if (set.supported) return &set;
  }
  return nullptr;  // not reached: portable always runs
}

const InstructionSet*& chosen() {
  static const InstructionSet* set = best();
  return set;
}

}  // namespace

const VectorKernels& vector_kernels() { return *chosen()->kernels; }

const char* instruction_set() { return chosen()->name; }

int fused_dtype(int keys_dtype) {
  if (!vector_kernels().fused_forward) return -1;
  const bool as_is = DType(keys_dtype) == DType::kBFloat16 && vector_kernels().multiplies_bfloat16;
  return int(as_is ? DType::kBFloat16 : DType::kFloat32);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : known()) {
    if (set.supported) names.push_back(set.name);
  }
  return names;
}

void select_instruction_set(const std::string& name) {
  std::string supported;
  for (const InstructionSet& set : known()) {
    if (!set.supported) continue;
    if (name == set.name) {
      chosen() = &set;
      return;
    }
    supported += std::string(supported.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is unknown or not supported by this processor; supported: " + supported);
}

}  // namespace pxc::cpu
