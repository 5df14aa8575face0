#if defined(__x86_64__)
#include "cpu.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RELREP_CORE kAvx2
#define RELREP_LANES 8
#define RELREP_MOST_SINGLE 12
#define RELREP_MOST_QUAD 3
#define RELREP_SUPPORTED (cpu_supports("avx2") && cpu_supports("fma"))
#include "core.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
