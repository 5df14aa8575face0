// Arm's SDOT multiplies signed bytes: X goes in less 128, which the bias makes up for.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace {

typedef std::int32_t Int __attribute__((vector_size(16)));

struct Wide {
  typedef int8x16_t Weight;
  static Weight from(Int w) { return (int8x16_t)w; }
  static Int add(Int sum, Int x, Weight w) {
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)veorq_u8((uint8x16_t)x, vdupq_n_u8(128)), w);
  }
};
typedef Wide Narrow;

inline bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every processor of Apple's that runs macOS
#endif
}

inline void put_bytes(std::uint8_t* to, Int v) {
  const uint16x4_t shorts = vmovn_u32((uint32x4_t)v);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(shorts, shorts))), 0);
  __builtin_memcpy(to, &bytes, 4);
}

}  // namespace

#define RELREP_CORE kInt8Dotprod
#define RELREP_LANES 4
#define RELREP_MOST 16
#define RELREP_LESS 128
#define RELREP_SUPPORTED has_dotprod()
#include "int8.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
