#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif

namespace {

typedef std::int32_t Int __attribute__((vector_size(32)));

struct Wide {
  typedef __m256i Weight;
  static Weight from(Int w) { return (__m256i)w; }
  static Int add(Int sum, Int x, Weight w) { return (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, w); }
};
typedef Wide Narrow;

// Older compilers' __builtin_cpu_supports does not know the name.
inline bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

#define RELREP_CORE kInt8AvxVnni
#define RELREP_LANES 8
#define RELREP_MOST 12
#define RELREP_LESS 0
#define RELREP_SUPPORTED has_avx_vnni()
#include "int8.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
