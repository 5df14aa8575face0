// Which instruction set runs: the widest this processor has, or the one that RELREP_KERNELS_ISA names.
#pragma once

#include "core.h"
#include "int8.h"

namespace relrep {

struct InstructionSet {
  const char* name;
  const Core* floats;
  const Int8Core* bytes;
};

// Throws Refusal where the variable names a set that is not there.
const InstructionSet& chosen_instruction_set();

// Comma-separated names of the sets this processor can run, widest first.
const char* instruction_set_names();

}  // namespace relrep
