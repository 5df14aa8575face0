// The operators as ONNX Runtime calls them, each with what follows fused in.
//
//   SparseConv[Add][Relu|Clip](X, values, gaps, bias[, residual])    attributes as Conv, and weight_shape
//   SparseGemm[Add][Relu|Clip](X, values, gaps, bias[, residual])    Y = X W^T + bias, weight_shape = [outputs, inputs]
//   SparseQConv[Clip](X, x_scale, x_zero_point, values, gaps, w_scale, y_scale, y_zero_point, bias)     as QLinearConv
//   SparseQGemm[Clip](the same)                                                      the product, rounded as QLinearConv's is
//
// values float[n] or int8[n] are the nonzeros of the row-major weight, gaps uint8[n] the distances between their positions (the first from 0).
#pragma once

#include <cstddef>

#include "ort_abi.h"

namespace relrep {

std::size_t operator_count();
const ort::CustomOp* operator_at(std::size_t index);

}  // namespace relrep
