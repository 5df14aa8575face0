// Bytes into lanes and back where the compiler's own conversions of vectors are slow, for the int8 loops of x86 and Arm.
#include <cstdint>
#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr std::int64_t kWoven = 16;

#if defined(__x86_64__)

inline __m128i sixteen(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline __m128i even_sixteen(const std::uint8_t* p) {
  const __m128i low = _mm_set1_epi16(255);
  return _mm_packus_epi16(_mm_and_si128(sixteen(p), low), _mm_and_si128(sixteen(p + 16), low));
}

inline void put_woven(std::uint32_t* to, __m128i a, __m128i b, __m128i c, __m128i d) {
  const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
  const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
  __m128i* out = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(out, _mm_unpacklo_epi16(ab0, cd0));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(ab0, cd0));
  _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(ab1, cd1));
  _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(ab1, cd1));
}

// Sixteen words of four rows' bytes; the second takes every other byte of 32.
inline void weave(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at) {
  put_woven(to, sixteen(row[0] + at), sixteen(row[1] + at), sixteen(row[2] + at), sixteen(row[3] + at));
}
inline void weave_even(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at) {
  put_woven(to, even_sixteen(row[0] + at), even_sixteen(row[1] + at), even_sixteen(row[2] + at), even_sixteen(row[3] + at));
}

#elif defined(__aarch64__)

inline void weave(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at) {
  uint8x16x4_t rows;
  for (int c = 0; c < 4; ++c) rows.val[c] = vld1q_u8(row[c] + at);
  vst4q_u8(reinterpret_cast<std::uint8_t*>(to), rows);
}
inline void weave_even(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at) {
  uint8x16x4_t rows;
  for (int c = 0; c < 4; ++c) rows.val[c] = vld2q_u8(row[c] + at).val[0];
  vst4q_u8(reinterpret_cast<std::uint8_t*>(to), rows);
}

#else

inline void weave(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at, std::int64_t step = 1) {
  for (std::int64_t i = 0; i < kWoven; ++i)
    for (int c = 0; c < 4; ++c) reinterpret_cast<std::uint8_t*>(to + i)[c] = row[c][at + step * i];
}
inline void weave_even(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t at) { weave(to, row, at, 2); }

#endif

}  // namespace
