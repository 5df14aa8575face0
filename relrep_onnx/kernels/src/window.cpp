#include "window.h"

#include <algorithm>

namespace relrep {
namespace {

constexpr std::int64_t kMostPad = 1024, kMostStep = 1 << 20;

}  // namespace

Window read_window(ort::Table api, const ort::KernelInfo* info, bool convolution) {
  Window w;
  w.weight_shape = integers(api, info, "weight_shape", {});
  if (w.weight_shape.size() != (convolution ? 4u : 2u))
    throw Refusal("weight_shape is [" + describe(w.weight_shape) + "]; a " +
                  (convolution ? "2-D convolution has 4 sizes" : "matrix has 2 sizes"));
  if (convolution) {
    w.group = integer(api, info, "group", 1);
    w.strides = integers(api, info, "strides", {1, 1});
    w.dilations = integers(api, info, "dilations", {1, 1});
    w.pads = integers(api, info, "pads", {0, 0, 0, 0});
    if (w.strides.size() != 2 || w.dilations.size() != 2 || w.pads.size() != 4)
      throw Refusal("a 2-D convolution has 2 strides, 2 dilations and 4 pads");
    for (const std::int64_t pad : w.pads)
      if (pad < 0 || pad > kMostPad)
        throw Refusal("pads are [" + describe(w.pads) + "]; each must be between 0 and " + std::to_string(kMostPad));
    for (const auto* steps : {&w.strides, &w.dilations})
      for (const std::int64_t step : *steps)
        if (step < 1 || step > kMostStep) throw Refusal("a stride or dilation is " + std::to_string(step));
  }
  checked_product(w.weight_shape, "weight_shape");
  if (w.group < 1 || w.rows() % w.group != 0)
    throw Refusal(std::to_string(w.rows()) + " output channels do not divide into " + std::to_string(w.group) + " groups");
  return w;
}

std::vector<std::int64_t> Window::output(const std::vector<std::int64_t>& x) const {
  if (!convolution()) {
    if (x.empty() || x.back() != weight_shape[1])
      throw Refusal("X is [" + describe(x) + "]; its last size must be " + std::to_string(weight_shape[1]));
    std::vector<std::int64_t> y = x;
    y.back() = rows();
    return y;
  }
  if (x.size() != 4 || x[1] != weight_shape[1] * group)
    throw Refusal("X is [" + describe(x) + "]; it needs 4 sizes and " + std::to_string(weight_shape[1] * group) + " channels");
  return {x[0], rows(), out_size(x[2], 0), out_size(x[3], 1)};
}

std::int64_t Window::out_size(std::int64_t size, std::size_t axis) const {
  const std::int64_t reach = (weight_shape[2 + axis] - 1) * dilations[axis] + 1;
  const std::int64_t padded = size + pads[axis] + pads[axis + 2];
  if (padded < reach)
    throw Refusal("the kernel reaches over " + std::to_string(reach) + " inputs, X with its padding has " + std::to_string(padded));
  return (padded - reach) / strides[axis] + 1;
}

ConvShape Window::shape(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& y) const {
  checked_product({x[0], x[1], std::max<std::int64_t>(x[2], 1), std::max<std::int64_t>(x[3], 1)}, "X");
  return {x[0], group,      weight_shape[1], rows() / group, x[2],         x[3],         y[2],   y[3], weight_shape[2],
          weight_shape[3], strides[0],      strides[1],     dilations[0], dilations[1], pads[0], pads[1]};
}

}  // namespace relrep
