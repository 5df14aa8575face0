// How a layer is computed for one shape of its input: tiles, blocks, and the nonzeros ordered for them.
#pragma once

#include <cstdint>
#include <vector>

#include "core.h"
#include "weights.h"

namespace relrep {

struct OwnedConvPlan {
  ConvPlan view;
  std::int64_t tasks, chunks;  // chunks: tasks are handed to the threads in so many pieces
  NonzeroLists lists;
  std::vector<std::int32_t> phases;
};

struct OwnedGemmPlan {
  GemmPlan view;
  std::int64_t tasks, chunks;
  NonzeroLists lists;
};

// Fills in the plan of one input shape; the result's pointers look into itself, so it is made in place.
void plan_convolution(const Weights& weights, ConvShape shape, const Epilogue& epilogue, const Core& core, OwnedConvPlan& out);
void plan_product(const Weights& weights, std::int64_t batch, const Epilogue& epilogue, const Core& core, OwnedGemmPlan& out);

}  // namespace relrep
