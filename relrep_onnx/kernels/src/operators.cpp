#include "operators.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>

#include "dispatch.h"
#include "plan.h"
#include "session.h"

namespace relrep {
namespace {

enum class Family { kConv, kGemm };
enum class Activation { kNone, kRelu, kClip };

struct Operator {
  ort::CustomOp base;  // first: ONNX Runtime hands back a pointer to it
  const char* name;
  Family family;
  bool adds;
  Activation activation;
};

constexpr std::int64_t kMostPad = 1024, kMostStep = 1 << 20;
constexpr std::size_t kPlans = 8;  // input shapes remembered per layer

// The last few plans, by the shape that they were made for; shared so that a running call keeps its own.
template <class Plan>
class Plans {
 public:
  template <class Make>
  std::shared_ptr<const Plan> get(const std::vector<std::int64_t>& key, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [known, plan] : plans_)
      if (known == key) return plan;
    auto plan = std::make_shared<Plan>();
    make(*plan);
    if (plans_.size() < kPlans)
      plans_.emplace_back(key, plan);
    else
      plans_[oldest_++ % kPlans] = {key, plan};
    return plan;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<std::vector<std::int64_t>, std::shared_ptr<const Plan>>> plans_;
  std::size_t oldest_ = 0;
};

// One node of a session.
class Kernel {
 public:
  Kernel(const Operator& op, ort::Table api, const ort::KernelInfo* info) : op_(op), api_(api), core_(chosen_core()) {
    weight_shape_ = integers(api, info, "weight_shape", {});
    if (op.family == Family::kConv) {
      read_window(info);
    } else if (weight_shape_.size() != 2) {
      throw Refusal("weight_shape is [" + describe(weight_shape_) + "]; a matrix has 2 sizes");
    }
    const std::int64_t size = checked_product(weight_shape_, "weight_shape");
    const std::int64_t rows = weight_shape_[0];
    if (group_ < 1 || rows % group_ != 0)
      throw Refusal(std::to_string(rows) + " output channels do not divide into " + std::to_string(group_) + " groups");
    const Tensor values = constant_tensor(api, info, 1, ort::kFloat, "values");
    const Tensor gaps = constant_tensor(api, info, 2, ort::kUint8, "gaps");
    const Tensor bias = constant_tensor(api, info, 3, ort::kFloat, "bias");
    if (values.dims.size() != 1 || gaps.dims != values.dims)
      throw Refusal("values [" + describe(values.dims) + "] and gaps [" + describe(gaps.dims) + "] must be two lists of one length");
    if (bias.dims != std::vector<std::int64_t>{rows})
      throw Refusal("bias is [" + describe(bias.dims) + "], not [" + std::to_string(rows) + "]");
    weights_ = read_weights(values.floats(), static_cast<const std::uint8_t*>(gaps.data), values.size(), rows, size / rows, group_);
    bias_.assign(bias.floats(), bias.floats() + rows);
    epilogue_ = {bias_.data(), -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
    if (op.activation == Activation::kRelu) epilogue_.low = 0.0f;
    if (op.activation == Activation::kClip) {
      epilogue_.low = number(api, info, "min");
      epilogue_.high = number(api, info, "max");
      if (!(epilogue_.low <= epilogue_.high)) throw Refusal("min is above max");
    }
  }

  void compute(ort::KernelContext* context) {
    std::size_t count = 0;
    check(ort::input_count(api_, context, &count));
    if (count != (op_.adds ? 5u : 4u)) throw Refusal("it has " + std::to_string(count) + " inputs");
    const Tensor x = input_tensor(api_, context, 0, "X");
    if (op_.family == Family::kConv)
      convolve(context, x);
    else
      multiply(context, x);
  }

  ort::Table api() const { return api_; }
  const Operator& op() const { return op_; }

 private:
  void read_window(const ort::KernelInfo* info) {
    if (weight_shape_.size() != 4) throw Refusal("weight_shape is [" + describe(weight_shape_) + "]; a 2-D convolution has 4 sizes");
    group_ = integer(api_, info, "group", 1);
    strides_ = integers(api_, info, "strides", {1, 1});
    dilations_ = integers(api_, info, "dilations", {1, 1});
    pads_ = integers(api_, info, "pads", {0, 0, 0, 0});
    if (strides_.size() != 2 || dilations_.size() != 2 || pads_.size() != 4)
      throw Refusal("a 2-D convolution has 2 strides, 2 dilations and 4 pads");
    for (const std::int64_t pad : pads_)
      if (pad < 0 || pad > kMostPad) throw Refusal("pads are [" + describe(pads_) + "]; each must be between 0 and " + std::to_string(kMostPad));
    for (const auto* steps : {&strides_, &dilations_})
      for (const std::int64_t step : *steps)
        if (step < 1 || step > kMostStep) throw Refusal("a stride or dilation is " + std::to_string(step));
  }

  const float* residual(ort::KernelContext* context, const std::vector<std::int64_t>& dims) const {
    if (!op_.adds) return nullptr;
    const Tensor tensor = input_tensor(api_, context, 4, "residual");
    if (tensor.dims != dims) throw Refusal("residual is [" + describe(tensor.dims) + "], the output [" + describe(dims) + "]");
    return tensor.floats();
  }

  // Outputs along one axis.
  std::int64_t out_size(std::int64_t size, int axis) const {
    const std::int64_t reach = (weight_shape_[2 + axis] - 1) * dilations_[axis] + 1;
    const std::int64_t padded = size + pads_[axis] + pads_[axis + 2];
    if (padded < reach)
      throw Refusal("the kernel reaches over " + std::to_string(reach) + " inputs, X with its padding has " + std::to_string(padded));
    return (padded - reach) / strides_[axis] + 1;
  }

  void convolve(ort::KernelContext* context, const Tensor& x) {
    if (x.dims.size() != 4 || x.dims[1] != weight_shape_[1] * group_)
      throw Refusal("X is [" + describe(x.dims) + "]; it needs 4 sizes and " + std::to_string(weight_shape_[1] * group_) + " channels");
    const std::vector<std::int64_t> dims{x.dims[0], weight_shape_[0], out_size(x.dims[2], 0), out_size(x.dims[3], 1)};
    const float* added = residual(context, dims);
    float* y = output_floats(api_, context, dims);
    if (x.dims[0] == 0) return;
    const auto plan = conv_plans_.get(x.dims, [&](OwnedConvPlan& out) {
      checked_product({x.dims[0], x.dims[1], std::max<std::int64_t>(x.dims[2], 1), std::max<std::int64_t>(x.dims[3], 1)}, "X");
      const ConvShape shape{x.dims[0],       group_,        weight_shape_[1], weight_shape_[0] / group_, x.dims[2],
                            x.dims[3],       dims[2],       dims[3],          weight_shape_[2],          weight_shape_[3],
                            strides_[0],     strides_[1],   dilations_[0],    dilations_[1],             pads_[0],
                            pads_[1]};
      plan_convolution(weights_, shape, epilogue_, core_, out);
    });
    const std::int64_t floats = conv_scratch(plan->view, core_.lanes);
    parallel(api_, context, plan->tasks, plan->chunks, [&](std::int64_t first, std::int64_t last) {
      core_.conv(plan->view, x.floats(), added, y, first, last, scratch(0, floats));
    });
  }

  void multiply(ort::KernelContext* context, const Tensor& x) {
    if (x.dims.empty() || x.dims.back() != weights_.cols)
      throw Refusal("X is [" + describe(x.dims) + "]; its last size must be " + std::to_string(weights_.cols));
    std::vector<std::int64_t> dims = x.dims;
    dims.back() = weights_.rows;
    const float* added = residual(context, dims);
    float* y = output_floats(api_, context, dims);
    const std::int64_t batch = x.size() / weights_.cols;
    if (batch == 0) return;
    const auto plan = gemm_plans_.get({batch}, [&](OwnedGemmPlan& out) {
      plan_product(weights_, batch, epilogue_, core_, out);
    });
    const GemmPlan& view = plan->view;
    if (batch == 1) {
      parallel(api_, context, plan->tasks, plan->chunks, [&](std::int64_t first, std::int64_t last) {
        core_.gemv(view, x.floats(), added, y, first * view.part, std::min(last * view.part, view.units));
      });
      return;
    }
    const std::int64_t places = view.vectors * core_.lanes;
    float* packed = scratch(1, view.subtiles * view.cols * places + kSlack);
    parallel(api_, context, view.subtiles, std::min(view.subtiles, plan->chunks), [&](std::int64_t first, std::int64_t last) {
      core_.pack(view, x.floats(), packed, first, last);
    });
    const std::int64_t floats = gemm_scratch(view, core_.lanes);
    parallel(api_, context, plan->tasks, plan->chunks, [&](std::int64_t first, std::int64_t last) {
      core_.gemm(view, packed, added, y, first, last, scratch(0, floats));
    });
  }

  const Operator& op_;
  ort::Table api_;
  const Core& core_;
  std::vector<std::int64_t> weight_shape_, strides_, dilations_, pads_;
  std::int64_t group_ = 1;
  Weights weights_;
  std::vector<float> bias_;
  Epilogue epilogue_{};
  Plans<OwnedConvPlan> conv_plans_;
  Plans<OwnedGemmPlan> gemm_plans_;
};

const Operator& self(const ort::CustomOp* op) { return *reinterpret_cast<const Operator*>(op); }

constexpr ort::CustomOp callbacks() {
  ort::CustomOp op{};
  op.version = ort::kCustomOpVersion;
  op.get_name = [](const ort::CustomOp* o) { return self(o).name; };
  op.get_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.get_input_type = [](const ort::CustomOp*, std::size_t i) -> int { return i == 2 ? ort::kUint8 : ort::kFloat; };
  op.get_input_count = [](const ort::CustomOp* o) -> std::size_t { return self(o).adds ? 5 : 4; };
  op.get_output_type = [](const ort::CustomOp*, std::size_t) -> int { return ort::kFloat; };
  op.get_output_count = [](const ort::CustomOp*) -> std::size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.get_input_characteristic = [](const ort::CustomOp*, std::size_t) -> int { return ort::kRequired; };
  op.get_output_characteristic = [](const ort::CustomOp*, std::size_t) -> int { return ort::kRequired; };
  op.get_input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };
  op.create_kernel_v2 = [](const ort::CustomOp* o, ort::Table api, const ort::KernelInfo* info, void** kernel) {
    return guarded(api, self(o).name, [&] { *kernel = new Kernel(self(o), api, info); });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    Kernel& k = *static_cast<Kernel*>(kernel);
    return guarded(k.api(), k.op().name, [&] { k.compute(context); });
  };
  return op;
}

constexpr Operator kOperators[] = {
    {callbacks(), "SparseConv", Family::kConv, false, Activation::kNone},
    {callbacks(), "SparseConvRelu", Family::kConv, false, Activation::kRelu},
    {callbacks(), "SparseConvClip", Family::kConv, false, Activation::kClip},
    {callbacks(), "SparseConvAdd", Family::kConv, true, Activation::kNone},
    {callbacks(), "SparseConvAddRelu", Family::kConv, true, Activation::kRelu},
    {callbacks(), "SparseConvAddClip", Family::kConv, true, Activation::kClip},
    {callbacks(), "SparseGemm", Family::kGemm, false, Activation::kNone},
    {callbacks(), "SparseGemmRelu", Family::kGemm, false, Activation::kRelu},
    {callbacks(), "SparseGemmClip", Family::kGemm, false, Activation::kClip},
    {callbacks(), "SparseGemmAdd", Family::kGemm, true, Activation::kNone},
    {callbacks(), "SparseGemmAddRelu", Family::kGemm, true, Activation::kRelu},
    {callbacks(), "SparseGemmAddClip", Family::kGemm, true, Activation::kClip},
};

}  // namespace

std::size_t operator_count() { return sizeof(kOperators) / sizeof(kOperators[0]); }
const ort::CustomOp* operator_at(std::size_t index) { return &kOperators[index].base; }

}  // namespace relrep
