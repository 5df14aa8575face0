#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "weights.h"

namespace relrep {
namespace {

constexpr const char* kVariable = "RELREP_KERNELS_ISA";

const Core* const kCores[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kPortable};

}  // namespace

const Core& chosen_core() {
  const char* wanted = std::getenv(kVariable);
  for (const Core* core : kCores)
    if (core->supported() && (wanted == nullptr || *wanted == '\0' || std::string(wanted) == core->name)) return *core;
  throw Refusal(std::string(kVariable) + " is '" + wanted + "'; this machine has " + core_names());
}

const char* core_names() {
  static const std::string names = [] {
    std::string text;
    for (const Core* core : kCores)
      if (core->supported()) text += (text.empty() ? "" : ",") + std::string(core->name);
    return text;
  }();
  return names.c_str();
}

}  // namespace relrep
