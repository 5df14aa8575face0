#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

typedef std::int32_t Int __attribute__((vector_size(32)));

// Pairs are added in int16, then pairs of these in int32.
struct Narrow {
  typedef __m256i Weight;
  static Weight from(Int w) { return (__m256i)w; }
  static Int add(Int sum, Int x, Weight w) {
    return sum + (Int)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)x, w), _mm256_set1_epi16(1));
  }
};

// Even and odd channels as int16, whose pairs are added in int32.
struct Wide {
  struct Weight {
    __m256i even, odd;
  };
  static Weight from(Int w) {
    return {_mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8), _mm256_srai_epi16((__m256i)w, 8)};
  }
  static Int add(Int sum, Int x, Weight w) {
    const __m256i even = _mm256_and_si256((__m256i)x, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16((__m256i)x, 8);
    return sum + (Int)_mm256_madd_epi16(even, w.even) + (Int)_mm256_madd_epi16(odd, w.odd);
  }
};

inline void put_bytes(std::uint8_t* to, Int v) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(shorts, shorts));
}

}  // namespace

#define RELREP_CORE kInt8Avx2
#define RELREP_LANES 8
#define RELREP_MOST 12
#define RELREP_LESS 0
#define RELREP_SUPPORTED (cpu_supports("avx2") && cpu_supports("fma"))
#include "int8.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
