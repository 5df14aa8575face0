// What this processor can run.
#pragma once

namespace relrep {

// Whether the processor has a set of instructions, by its name in lower case ("avx2"), and the operating system keeps its registers.
// In place of __builtin_cpu_supports, which answers no to everything where zig links its own runtime library.
bool cpu_supports(const char* name);

}  // namespace relrep
