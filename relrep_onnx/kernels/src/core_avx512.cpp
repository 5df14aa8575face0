#if defined(__x86_64__)
#include "cpu.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx2,fma")
#endif
#define RELREP_CORE kAvx512
#define RELREP_LANES 16
#define RELREP_MOST_SINGLE 16
#define RELREP_MOST_QUAD 6
#define RELREP_SUPPORTED (cpu_supports("avx512f") && cpu_supports("avx512vl"))
#include "core.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
