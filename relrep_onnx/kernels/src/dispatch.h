// Which instruction set runs: the widest this processor has, or the one that RELREP_KERNELS_ISA names.
#pragma once

#include "core.h"

namespace relrep {

// Throws Refusal where the variable names a set that is not there.
const Core& chosen_core();

// Comma-separated names of the sets this processor can run, widest first.
const char* core_names();

}  // namespace relrep
