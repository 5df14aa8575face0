// ONNX Runtime's objects as the operators want them: statuses become exceptions, tensors become pointers with checked shapes.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "ort_abi.h"
#include "weights.h"

namespace relrep {

// A status of ONNX Runtime's own on its way back to it.
struct OrtError {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw OrtError{status};
}

struct Tensor {
  void* data;
  std::vector<std::int64_t> dims;

  std::int64_t size() const {
    std::int64_t n = 1;
    for (const std::int64_t d : dims) n *= d;
    return n;
  }
  template <class Value>
  const Value* as() const {
    return static_cast<const Value*>(data);
  }
};

// Throws Refusal where the value is missing or of another type.
Tensor read_tensor(ort::Table api, const ort::Value* value, ort::ElementType type, const char* name);
Tensor constant_tensor(ort::Table api, const ort::KernelInfo* info, std::size_t index, ort::ElementType type, const char* name);
Tensor input_tensor(ort::Table api, const ort::KernelContext* context, std::size_t index, ort::ElementType type, const char* name);
void* output_data(ort::Table api, ort::KernelContext* context, const std::vector<std::int64_t>& dims);

// Throws Refusal where a node has another number of inputs, or a layer's stored tensors do not fit together.
void check_inputs(ort::Table api, const ort::KernelContext* context, std::size_t wanted);
void check_lists(const Tensor& values, const Tensor& gaps, const Tensor& bias, std::int64_t rows);

// An attribute that is a list of integers; `otherwise` where it is absent.
std::vector<std::int64_t> integers(ort::Table api, const ort::KernelInfo* info, const char* name,
                                   std::vector<std::int64_t> otherwise);
std::int64_t integer(ort::Table api, const ort::KernelInfo* info, const char* name, std::int64_t otherwise);
float number(ort::Table api, const ort::KernelInfo* info, const char* name);

// Memory of the running thread, in words of four bytes, that grows to what was asked for and stays; each slot is one buffer.
// Throws std::bad_alloc.
void* scratch(int slot, std::int64_t words);

// Runs work(first, last) over [0, tasks) in `chunks` pieces on the session's threads.  Throws Refusal if one ran out of memory.
void parallel(ort::Table api, const ort::KernelContext* context, std::int64_t tasks, std::int64_t chunks,
              const std::function<void(std::int64_t, std::int64_t)>& work);

// Runs `body`, and turns what it throws into a status.
ort::Status* guarded(ort::Table api, const char* op, const std::function<void()>& body);

}  // namespace relrep
