// How a layer moves over its input: the attributes of a convolution, or a matrix's two sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "core.h"
#include "session.h"

namespace relrep {

struct Window {
  std::vector<std::int64_t> weight_shape, strides, dilations, pads;
  std::int64_t group = 1;

  bool convolution() const { return weight_shape.size() == 4; }
  std::int64_t rows() const { return weight_shape[0]; }
  std::int64_t kernel() const { return convolution() ? weight_shape[2] * weight_shape[3] : 1; }

  // The output's shape; throws Refusal where X does not fit.
  std::vector<std::int64_t> output(const std::vector<std::int64_t>& x) const;
  // Of a convolution whose X has been accepted.
  ConvShape shape(const std::vector<std::int64_t>& x, const std::vector<std::int64_t>& y) const;

 private:
  std::int64_t out_size(std::int64_t size, std::size_t axis) const;
};

// Reads and checks the attributes, weight_shape among them.
Window read_window(ort::Table api, const ort::KernelInfo* info, bool convolution);

}  // namespace relrep
