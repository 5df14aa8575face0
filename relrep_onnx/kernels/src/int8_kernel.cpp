// SparseQConv and SparseQGemm: uint8 in and out, int8 weights with a scale per output channel.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "int8.h"
#include "kernel.h"
#include "plan.h"
#include "session.h"
#include "window.h"

namespace relrep {
namespace {

constexpr double kPace = 1.0;  // cycles of one vector and cell
constexpr std::int64_t kMostInput = 255;

struct Lists {
  std::vector<std::int32_t> start;
  std::vector<Block> block;
  bool wide = false;

  template <class Place>
  void fill(const Int8Weights& w, std::int64_t blocks, const Place& place) {
    wide = w.wide;
    block.resize(w.cells.size());
    start = order_lists(w, blocks, place, [&](std::size_t at, const Int8Cell& cell, std::int32_t offset) {
      std::memcpy(&block[at].weight, cell.weight, 4);
      block[at].offset = offset;
    });
  }
  Blocks view() const { return {wide, start.data(), block.data()}; }
};

// Views point into the rest, so plans are made in place.
struct OwnedConvPlan {
  Int8ConvPlan view;
  ConvLayout layout;
  Lists lists;
};

struct OwnedGemmPlan {
  Int8GemmPlan view;
  ProductLayout layout;
  Lists lists;
};

class Int8Kernel final : public Kernel {
 public:
  Int8Kernel(const Variant& variant, ort::Table api, const ort::KernelInfo* info)
      : api_(api), core_(*chosen_instruction_set().bytes), window_(read_window(api, info, variant.convolution)) {
    const std::int64_t rows = window_.rows();
    const float x_scale = one<float>(info, 1, ort::kFloat, "x_scale");
    x_zero_ = one<std::uint8_t>(info, 2, ort::kUint8, "x_zero_point");
    const Tensor values = constant_tensor(api, info, 3, ort::kInt8, "values");
    const Tensor gaps = constant_tensor(api, info, 4, ort::kUint8, "gaps");
    const Tensor w_scale = constant_tensor(api, info, 5, ort::kFloat, "w_scale");
    const float y_scale = one<float>(info, 6, ort::kFloat, "y_scale");
    const std::uint8_t y_zero = one<std::uint8_t>(info, 7, ort::kUint8, "y_zero_point");
    const Tensor bias = constant_tensor(api, info, 8, ort::kInt32, "bias");
    check_lists(values, gaps, bias, rows);
    if (w_scale.dims != bias.dims) throw Refusal("w_scale is [" + describe(w_scale.dims) + "], not [" + std::to_string(rows) + "]");
    weights_ = read_weights(values.as<std::int8_t>(), gaps.as<std::uint8_t>(), values.size(), rows, window_.weight_shape[1],
                            window_.kernel(), window_.group);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::size_t i = static_cast<std::size_t>(row);
      const float scale = x_scale * w_scale.as<float>()[row] / y_scale;
      if (!std::isfinite(scale)) throw Refusal("the scale of output channel " + std::to_string(row) + " is not finite");
      const std::int64_t given = bias.as<std::int32_t>()[row];
      if (std::abs(given) + kMostInput * weights_.reach[i] > INT32_MAX)
        throw Refusal("the sums of output channel " + std::to_string(row) + " may leave int32");
      scale_.push_back(scale);
      bias_.push_back(static_cast<std::int32_t>(given + (core_.less - std::int64_t{x_zero_}) * weights_.sum[i]));
    }
    std::int64_t low = 0, high = kMostInput;
    if (variant.activation == Activation::kClip) {
      low = std::max<std::int64_t>(integer(api, info, "low", low), low);
      high = std::min<std::int64_t>(integer(api, info, "high", high), high);
      if (low > high) throw Refusal("low is above high");
    }
    requantize_ = {bias_.data(), scale_.data(), static_cast<float>(low - y_zero), static_cast<float>(high - y_zero), y_zero};
    load_ = {window_.group, weights_.units, static_cast<std::int64_t>(weights_.cells.size()), false, core_.lanes, core_.most, kPace,
             false};
  }

  void compute(ort::KernelContext* context) override {
    check_inputs(api_, context, 9);
    const Tensor x = input_tensor(api_, context, 0, ort::kUint8, "X");
    const std::vector<std::int64_t> dims = window_.output(x.dims);
    std::uint8_t* y = static_cast<std::uint8_t*>(output_data(api_, context, dims));
    if (window_.convolution())
      convolve(context, x, y, dims);
    else
      multiply(context, x, y);
  }

 private:
  // A constant of one element.
  template <class Value>
  Value one(const ort::KernelInfo* info, std::size_t index, ort::ElementType type, const char* name) const {
    const Tensor tensor = constant_tensor(api_, info, index, type, name);
    if (tensor.size() != 1) throw Refusal(std::string(name) + " is [" + describe(tensor.dims) + "], not one number");
    return *tensor.as<Value>();
  }

  void convolve(ort::KernelContext* context, const Tensor& x, std::uint8_t* y, const std::vector<std::int64_t>& dims) {
    if (x.dims[0] == 0) return;
    const auto plan = conv_plans_.get(x.dims, [&](OwnedConvPlan& out) {
      ConvShape shape = window_.shape(x.dims, dims);
      shape.channels = (weights_.inputs + 3) / 4;
      const ConvLayout& l = out.layout = lay_out(load_, shape);
      out.lists.fill(weights_, l.tiling.blocks, [&](std::int32_t column) { return l.place(column); });
      out.view = {l.shape, weights_.inputs, l.tiling, l.phases.data(), weights_.units, x_zero_, out.lists.view(), requantize_};
    });
    const std::int64_t words = conv_scratch(plan->view, core_.lanes);
    parallel(api_, context, plan->layout.tasks, plan->layout.chunks, [&](std::int64_t first, std::int64_t last) {
      core_.conv(plan->view, x.as<std::uint8_t>(), y, first, last, scratch(0, words));
    });
  }

  void multiply(ort::KernelContext* context, const Tensor& x, std::uint8_t* y) {
    const std::int64_t batch = x.size() / weights_.inputs;
    if (batch == 0) return;
    const auto plan = gemm_plans_.get({batch}, [&](OwnedGemmPlan& out) {
      const ProductLayout& l = out.layout = lay_out(load_, weights_.cols, batch);
      out.lists.fill(weights_, l.blocks, [&](std::int32_t column) { return l.place(column); });
      out.view = {weights_.rows, weights_.inputs, weights_.cols, batch,  l.block, l.blocks, l.vectors,
                  l.subtiles,    l.part,          out.lists.view(), requantize_};
    });
    const Int8GemmPlan& view = plan->view;
    const ProductLayout& layout = plan->layout;
    if (batch == 1) {
      std::uint8_t* row = static_cast<std::uint8_t*>(scratch(1, view.cols));
      std::memcpy(row, x.data, static_cast<std::size_t>(view.inputs));
      parallel(api_, context, layout.tasks, layout.chunks, [&](std::int64_t first, std::int64_t last) {
        core_.gemv(view, row, y, first * view.part, std::min(last * view.part, view.rows));
      });
      return;
    }
    void* packed = scratch(1, view.subtiles * view.cols * view.vectors * core_.lanes + kSlack);
    parallel(api_, context, view.subtiles, std::min(view.subtiles, layout.chunks), [&](std::int64_t first, std::int64_t last) {
      core_.pack(view, x.as<std::uint8_t>(), packed, first, last);
    });
    const std::int64_t words = gemm_scratch(view, core_.lanes);
    parallel(api_, context, layout.tasks, layout.chunks, [&](std::int64_t first, std::int64_t last) {
      core_.gemm(view, packed, y, first, last, scratch(0, words));
    });
  }

  ort::Table api_;
  const Int8Core& core_;
  Window window_;
  std::uint8_t x_zero_ = 0;
  Int8Weights weights_;
  Load load_{};
  std::vector<std::int32_t> bias_;
  std::vector<float> scale_;
  Requantize requantize_{};
  Plans<OwnedConvPlan> conv_plans_;
  Plans<OwnedGemmPlan> gemm_plans_;
};

}  // namespace

std::unique_ptr<Kernel> make_int8_kernel(const Variant& variant, ort::Table api, const ort::KernelInfo* info) {
  return std::make_unique<Int8Kernel>(variant, api, info);
}

}  // namespace relrep
