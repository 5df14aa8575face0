// Four lanes by what the compiler targets anyway: SSE2 on x86-64, NEON on 64-bit Arm, plain scalars elsewhere.
#define RELREP_CORE kPortable
#if defined(__aarch64__)
#define RELREP_MOST_SINGLE 16
#define RELREP_MOST_QUAD 6
#else
#define RELREP_MOST_SINGLE 8
#define RELREP_MOST_QUAD 2
#endif
#define RELREP_LANES 4
#define RELREP_SUPPORTED true
#include "core.inl"
