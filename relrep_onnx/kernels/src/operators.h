// The operators as ONNX Runtime calls them: SparseConv and SparseGemm, each with what follows fused in.
//
//   SparseConv[Add][Relu|Clip](X, values, gaps, bias[, residual])    attributes as Conv, and weight_shape
//   SparseGemm[Add][Relu|Clip](X, values, gaps, bias[, residual])    Y = X W^T + bias, weight_shape = [outputs, inputs]
//
// values float[n] are the nonzeros of the row-major weight, gaps uint8[n] the distances between their positions (the first from 0).
#pragma once

#include <cstddef>

#include "ort_abi.h"

namespace relrep {

std::size_t operator_count();
const ort::CustomOp* operator_at(std::size_t index);

}  // namespace relrep
