// Four lanes by what the compiler targets anyway: SSE2's products of int16 on x86-64, the compiler's own vectors elsewhere.
#include <cstdint>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

typedef std::int32_t Int __attribute__((vector_size(16)));

#if defined(__x86_64__)
struct Wide {
  struct Weight {
    __m128i even, odd;
  };
  static Weight from(Int w) { return {_mm_srai_epi16(_mm_slli_epi16((__m128i)w, 8), 8), _mm_srai_epi16((__m128i)w, 8)}; }
  static Int add(Int sum, Int x, Weight w) {
    const __m128i even = _mm_and_si128((__m128i)x, _mm_set1_epi16(255)), odd = _mm_srli_epi16((__m128i)x, 8);
    return sum + (Int)_mm_madd_epi16(even, w.even) + (Int)_mm_madd_epi16(odd, w.odd);
  }
};
#else
typedef std::uint32_t Unsigned __attribute__((vector_size(16)));

struct Wide {
  struct Weight {
    Int w[4];
  };
  static Weight from(Int w) {
    const Unsigned bits = (Unsigned)w;
    return {{(Int)(bits << 24) >> 24, (Int)(bits << 16) >> 24, (Int)(bits << 8) >> 24, w >> 24}};
  }
  static Int add(Int sum, Int x, Weight w) {
    const Unsigned bits = (Unsigned)x;
    return sum + (Int)(bits & 255) * w.w[0] + (Int)(bits >> 8 & 255) * w.w[1] + (Int)(bits >> 16 & 255) * w.w[2] +
           (Int)(bits >> 24) * w.w[3];
  }
};
#endif
typedef Wide Narrow;

inline void put_bytes(std::uint8_t* to, Int v) {
#if defined(__x86_64__)
  const __m128i shorts = _mm_packs_epi32((__m128i)v, (__m128i)v);
  const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
  __builtin_memcpy(to, &bytes, 4);
#else
  for (int lane = 0; lane < 4; ++lane) to[lane] = static_cast<std::uint8_t>(v[lane]);
#endif
}

}  // namespace

#define RELREP_CORE kInt8Portable
#define RELREP_LANES 4
#define RELREP_MOST 8
#define RELREP_LESS 0
#define RELREP_SUPPORTED true
#include "int8.inl"
