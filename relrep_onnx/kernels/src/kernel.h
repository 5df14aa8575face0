// One node of a session, as the table of operators makes and calls it.
#pragma once

#include <cstddef>
#include <memory>

#include "ort_abi.h"

namespace relrep {

enum class Activation { kNone, kRelu, kClip };

// What an operator's name says.
struct Variant {
  const char* name;
  bool convolution, adds;
  Activation activation;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  // Throws Refusal, OrtError or std::bad_alloc.
  virtual void compute(ort::KernelContext* context) = 0;
};

using MakeKernel = std::unique_ptr<Kernel>(const Variant&, ort::Table, const ort::KernelInfo*);
MakeKernel make_float_kernel, make_int8_kernel;

}  // namespace relrep
