// Which instruction set the vector kernels use.
#include <stdexcept>

#include "cpu.h"

namespace pxc {
namespace {

struct InstructionSet {
  const char* name;
  const VectorKernels* kernels;
  bool supported;
};

// Best first.
const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = {
#ifdef __x86_64__
      {"avx512", &avx512::kVectorKernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx2", &avx2::kVectorKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"portable", &portable::kVectorKernels, true},
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

}  // namespace pxc
