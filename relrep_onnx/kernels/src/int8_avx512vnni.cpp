#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")
#endif

namespace {

typedef std::int32_t Int __attribute__((vector_size(64)));

struct Wide {
  typedef __m512i Weight;
  static Weight from(Int w) { return (__m512i)w; }
  static Int add(Int sum, Int x, Weight w) { return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, w); }
};
typedef Wide Narrow;

inline void put_bytes(std::uint8_t* to, Int v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
}

}  // namespace

#define RELREP_CORE kInt8Avx512Vnni
#define RELREP_LANES 16
#define RELREP_MOST 16
#define RELREP_LESS 0
#define RELREP_SUPPORTED \
  (cpu_supports("avx512f") && cpu_supports("avx512bw") && cpu_supports("avx512vl") && cpu_supports("avx512vnni"))
#include "int8.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
