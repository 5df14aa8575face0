// SparseConv and SparseGemm on float32.
#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernel.h"
#include "plan.h"
#include "session.h"
#include "window.h"

namespace relrep {
namespace {

// Cycles of one vector and cell, single and quad.
constexpr double kPace = 0.65, kQuadPace = 2.1;

struct Lists {
  std::vector<std::int32_t> start;
  std::vector<Single> single;
  std::vector<Quad> quad;

  template <class Place>
  void fill(const Weights& w, std::int64_t blocks, const Place& place) {
    if (w.quads) {
      quad.resize(w.cells.size());
      start = order_lists(w, blocks, place, [&](std::size_t at, const Cell& cell, std::int32_t offset) {
        quad[at] = {offset, {cell.weight[0], cell.weight[1], cell.weight[2], cell.weight[3]}};
      });
    } else {
      single.resize(w.cells.size());
      start = order_lists(w, blocks, place,
                          [&](std::size_t at, const Cell& cell, std::int32_t offset) { single[at] = {cell.weight[0], offset}; });
    }
  }
  Nonzeros view() const { return {!quad.empty(), start.data(), single.data(), quad.data()}; }
};

// Views point into the rest, so plans are made in place.
struct OwnedConvPlan {
  ConvPlan view;
  ConvLayout layout;
  Lists lists;
};

struct OwnedGemmPlan {
  GemmPlan view;
  ProductLayout layout;
  Lists lists;
};

class FloatKernel final : public Kernel {
 public:
  FloatKernel(const Variant& variant, ort::Table api, const ort::KernelInfo* info)
      : variant_(variant), api_(api), core_(*chosen_instruction_set().floats), window_(read_window(api, info, variant.convolution)) {
    const std::int64_t rows = window_.rows();
    const Tensor values = constant_tensor(api, info, 1, ort::kFloat, "values");
    const Tensor gaps = constant_tensor(api, info, 2, ort::kUint8, "gaps");
    const Tensor bias = constant_tensor(api, info, 3, ort::kFloat, "bias");
    check_lists(values, gaps, bias, rows);
    const std::int64_t cols = window_.weight_shape[1] * window_.kernel();
    weights_ = read_weights(values.as<float>(), gaps.as<std::uint8_t>(), values.size(), rows, cols, window_.group);
    load_ = {window_.group,
             weights_.units,
             static_cast<std::int64_t>(weights_.cells.size()),
             weights_.quads,
             core_.lanes,
             weights_.quads ? core_.most_quad : core_.most_single,
             weights_.quads ? kQuadPace : kPace,
             true};
    bias_.assign(bias.as<float>(), bias.as<float>() + rows);
    epilogue_ = {bias_.data(), -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
    if (variant.activation == Activation::kRelu) epilogue_.low = 0.0f;
    if (variant.activation == Activation::kClip) {
      epilogue_.low = number(api, info, "min");
      epilogue_.high = number(api, info, "max");
      if (!(epilogue_.low <= epilogue_.high)) throw Refusal("min is above max");
    }
  }

  void compute(ort::KernelContext* context) override {
    check_inputs(api_, context, variant_.adds ? 5 : 4);
    const Tensor x = input_tensor(api_, context, 0, ort::kFloat, "X");
    const std::vector<std::int64_t> dims = window_.output(x.dims);
    const float* added = residual(context, dims);
    float* y = static_cast<float*>(output_data(api_, context, dims));
    if (window_.convolution())
      convolve(context, x, added, y, dims);
    else
      multiply(context, x, added, y);
  }

 private:
  const float* residual(ort::KernelContext* context, const std::vector<std::int64_t>& dims) const {
    if (!variant_.adds) return nullptr;
    const Tensor tensor = input_tensor(api_, context, 4, ort::kFloat, "residual");
    if (tensor.dims != dims) throw Refusal("residual is [" + describe(tensor.dims) + "], the output [" + describe(dims) + "]");
    return tensor.as<float>();
  }

  void convolve(ort::KernelContext* context, const Tensor& x, const float* added, float* y, const std::vector<std::int64_t>& dims) {
    if (x.dims[0] == 0) return;
    const auto plan = conv_plans_.get(x.dims, [&](OwnedConvPlan& out) {
      out.layout = lay_out(load_, window_.shape(x.dims, dims));
      out.lists.fill(weights_, out.layout.tiling.blocks, [&](std::int32_t column) { return out.layout.place(column); });
      out.view = {out.layout.shape, out.layout.tiling, out.layout.phases.data(), weights_.units, out.lists.view(), epilogue_};
    });
    const std::int64_t words = conv_scratch(plan->view, core_.lanes);
    parallel(api_, context, plan->layout.tasks, plan->layout.chunks, [&](std::int64_t first, std::int64_t last) {
      core_.conv(plan->view, x.as<float>(), added, y, first, last, static_cast<float*>(scratch(0, words)));
    });
  }

  void multiply(ort::KernelContext* context, const Tensor& x, const float* added, float* y) {
    const std::int64_t batch = x.size() / weights_.cols;
    if (batch == 0) return;
    const auto plan = gemm_plans_.get({batch}, [&](OwnedGemmPlan& out) {
      const ProductLayout& l = out.layout = lay_out(load_, weights_.cols, batch);
      out.lists.fill(weights_, l.blocks, [&](std::int32_t column) { return l.place(column); });
      out.view = {weights_.rows, weights_.cols,  batch,  l.block,          l.blocks, l.vectors,
                  l.subtiles,    weights_.units, l.part, out.lists.view(), epilogue_};
    });
    const GemmPlan& view = plan->view;
    const ProductLayout& layout = plan->layout;
    if (batch == 1) {
      parallel(api_, context, layout.tasks, layout.chunks, [&](std::int64_t first, std::int64_t last) {
        core_.gemv(view, x.as<float>(), added, y, first * view.part, std::min(last * view.part, view.units));
      });
      return;
    }
    const std::int64_t places = view.vectors * core_.lanes;
    float* packed = static_cast<float*>(scratch(1, view.subtiles * view.cols * places + kSlack));
    parallel(api_, context, view.subtiles, std::min(view.subtiles, layout.chunks), [&](std::int64_t first, std::int64_t last) {
      core_.pack(view, x.as<float>(), packed, first, last);
    });
    const std::int64_t words = gemm_scratch(view, core_.lanes);
    parallel(api_, context, layout.tasks, layout.chunks, [&](std::int64_t first, std::int64_t last) {
      core_.gemm(view, packed, added, y, first, last, static_cast<float*>(scratch(0, words)));
    });
  }

  const Variant& variant_;
  ort::Table api_;
  const Core& core_;
  Window window_;
  Weights weights_;
  Load load_{};
  std::vector<float> bias_;
  Epilogue epilogue_{};
  Plans<OwnedConvPlan> conv_plans_;
  Plans<OwnedGemmPlan> gemm_plans_;
};

}  // namespace

std::unique_ptr<Kernel> make_float_kernel(const Variant& variant, ort::Table api, const ort::KernelInfo* info) {
  return std::make_unique<FloatKernel>(variant, api, info);
}

}  // namespace relrep
