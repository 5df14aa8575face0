#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstring>

namespace relrep {
namespace {

enum Register { kEax, kEbx, kEcx, kEdx };
constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // of XCR0: the registers that the operating system saves

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register where;
  unsigned bit, state;
};

constexpr Feature kFeatures[] = {
    {"fma", 1, 0, kEcx, 12, kYmm},      {"avx2", 7, 0, kEbx, 5, kYmm},       {"avxvnni", 7, 1, kEax, 4, kYmm},
    {"avx512f", 7, 0, kEbx, 16, kZmm},  {"avx512bw", 7, 0, kEbx, 30, kZmm},  {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512vnni", 7, 0, kEcx, 11, kZmm},
};

unsigned saved_registers() {
  unsigned r[4] = {};
  if (!__get_cpuid(1, &r[kEax], &r[kEbx], &r[kEcx], &r[kEdx]) || !(r[kEcx] >> 27 & 1)) return 0;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

}  // namespace

bool cpu_supports(const char* name) {
  for (const Feature& f : kFeatures) {
    unsigned r[4] = {};
    if (std::strcmp(f.name, name) == 0)
      return __get_cpuid_count(f.leaf, f.subleaf, &r[kEax], &r[kEbx], &r[kEcx], &r[kEdx]) && (r[f.where] >> f.bit & 1) &&
             (saved_registers() & f.state) == f.state;
  }
  return false;
}

}  // namespace relrep
#endif
