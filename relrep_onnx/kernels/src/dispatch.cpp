#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "weights.h"

namespace relrep {
namespace {

constexpr const char* kVariable = "RELREP_KERNELS_ISA";

constexpr InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512vnni", &kAvx512, &kInt8Avx512Vnni}, {"avx512", &kAvx512, &kInt8Avx2}, {"avxvnni", &kAvx2, &kInt8AvxVnni},
    {"avx2", &kAvx2, &kInt8Avx2},               {"portable", &kPortable, &kInt8Portable},
#elif defined(__aarch64__)
    {"dotprod", &kPortable, &kInt8Dotprod},     {"neon", &kPortable, &kInt8Portable},
#else
    {"portable", &kPortable, &kInt8Portable},
#endif
};

bool supported(const InstructionSet& set) { return set.floats->supported() && set.bytes->supported(); }

}  // namespace

const InstructionSet& chosen_instruction_set() {
  const char* wanted = std::getenv(kVariable);
  for (const InstructionSet& set : kSets)
    if (supported(set) && (wanted == nullptr || *wanted == '\0' || std::string(wanted) == set.name)) return set;
  throw Refusal(std::string(kVariable) + " is '" + wanted + "'; this machine has " + instruction_set_names());
}

const char* instruction_set_names() {
  static const std::string names = [] {
    std::string text;
    for (const InstructionSet& set : kSets)
      if (supported(set)) text += (text.empty() ? "" : ",") + std::string(set.name);
    return text;
  }();
  return names.c_str();
}

}  // namespace relrep
