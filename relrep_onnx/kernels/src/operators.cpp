#include "operators.h"

#include "kernel.h"
#include "session.h"

namespace relrep {
namespace {

struct Operator {
  ort::CustomOp base;  // first: ONNX Runtime hands back a pointer to it
  Variant variant;
  MakeKernel* make;
  ort::ElementType inputs[9];
  std::size_t input_count;
};

// A kernel with what its errors need.
struct Node {
  ort::Table api;
  const char* name;
  std::unique_ptr<Kernel> kernel;
};

const Operator& self(const ort::CustomOp* op) { return *reinterpret_cast<const Operator*>(op); }

constexpr ort::CustomOp callbacks() {
  ort::CustomOp op{};
  op.version = ort::kCustomOpVersion;
  op.get_name = [](const ort::CustomOp* o) { return self(o).variant.name; };
  op.get_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.get_input_type = [](const ort::CustomOp* o, std::size_t i) -> int { return self(o).inputs[i]; };
  op.get_input_count = [](const ort::CustomOp* o) -> std::size_t { return self(o).input_count; };
  op.get_output_type = [](const ort::CustomOp* o, std::size_t) -> int { return self(o).inputs[0]; };
  op.get_output_count = [](const ort::CustomOp*) -> std::size_t { return 1; };
  op.destroy = [](void* node) { delete static_cast<Node*>(node); };
  op.get_input_characteristic = [](const ort::CustomOp*, std::size_t) -> int { return ort::kRequired; };
  op.get_output_characteristic = [](const ort::CustomOp*, std::size_t) -> int { return ort::kRequired; };
  op.get_input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };
  op.create_kernel_v2 = [](const ort::CustomOp* o, ort::Table api, const ort::KernelInfo* info, void** node) {
    const Operator& op = self(o);
    return guarded(api, op.variant.name, [&] { *node = new Node{api, op.variant.name, op.make(op.variant, api, info)}; });
  };
  op.compute_v2 = [](void* node, ort::KernelContext* context) {
    const Node& n = *static_cast<Node*>(node);
    return guarded(n.api, n.name, [&] { n.kernel->compute(context); });
  };
  return op;
}

constexpr Operator floating(const char* name, bool convolution, bool adds, Activation activation) {
  return {callbacks(),
          {name, convolution, adds, activation},
          make_float_kernel,
          {ort::kFloat, ort::kFloat, ort::kUint8, ort::kFloat, ort::kFloat},
          adds ? std::size_t{5} : std::size_t{4}};
}

constexpr Operator quantized(const char* name, bool convolution, Activation activation) {
  return {callbacks(),
          {name, convolution, false, activation},
          make_int8_kernel,
          {ort::kUint8, ort::kFloat, ort::kUint8, ort::kInt8, ort::kUint8, ort::kFloat, ort::kFloat, ort::kUint8, ort::kInt32},
          9};
}

constexpr Operator kOperators[] = {
    floating("SparseConv", true, false, Activation::kNone),
    floating("SparseConvRelu", true, false, Activation::kRelu),
    floating("SparseConvClip", true, false, Activation::kClip),
    floating("SparseConvAdd", true, true, Activation::kNone),
    floating("SparseConvAddRelu", true, true, Activation::kRelu),
    floating("SparseConvAddClip", true, true, Activation::kClip),
    floating("SparseGemm", false, false, Activation::kNone),
    floating("SparseGemmRelu", false, false, Activation::kRelu),
    floating("SparseGemmClip", false, false, Activation::kClip),
    floating("SparseGemmAdd", false, true, Activation::kNone),
    floating("SparseGemmAddRelu", false, true, Activation::kRelu),
    floating("SparseGemmAddClip", false, true, Activation::kClip),
    quantized("SparseQConv", true, Activation::kNone),
    quantized("SparseQConvClip", true, Activation::kClip),
    quantized("SparseQGemm", false, Activation::kNone),
    quantized("SparseQGemmClip", false, Activation::kClip),
};

}  // namespace

std::size_t operator_count() { return sizeof(kOperators) / sizeof(kOperators[0]); }
const ort::CustomOp* operator_at(std::size_t index) { return &kOperators[index].base; }

}  // namespace relrep
