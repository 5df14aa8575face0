#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu.h"
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

inline void put_bytes(std::uint8_t* to, Int v) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(shorts, shorts));
}

}  // namespace

#define RELREP_CORE kInt8AvxVnni
#define RELREP_LANES 8
#define RELREP_MOST 12
#define RELREP_LESS 0
#define RELREP_SUPPORTED (cpu_supports("avx2") && cpu_supports("fma") && cpu_supports("avxvnni"))
#include "int8.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
