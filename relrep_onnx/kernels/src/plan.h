// How a layer is computed for one shape of its input: tiles, blocks, tasks, and where nonzeros read, whatever their type is.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core.h"
#include "weights.h"

namespace relrep {

// What a plan must know of a layer and of the instruction set.  Inputs are counted in words of four bytes.
struct Load {
  std::int64_t groups, units, cells;  // units per group, cells of all
  bool quads;
  std::int64_t lanes, most;  // vectors held at a time
  double pace;               // cycles of one vector and cell
  bool floats;               // X may be read where it lies, and depthwise layers have a loop of their own
};

// Which phases (position modulo stride) the kernel's positions along one axis have, and the number of each position's phase.
struct AxisPhases {
  std::vector<std::int32_t> phases;
  std::vector<std::int64_t> number;
};

struct ConvLayout {
  ConvShape shape;
  Tiling tiling;
  std::vector<std::int32_t> phases;
  std::int64_t tasks, chunks;  // chunks: tasks are handed to the threads in so many pieces
  AxisPhases down, across;

  // Block and byte offset of a column of the weight.
  std::pair<std::int64_t, std::int32_t> place(std::int32_t column) const;
};

struct ProductLayout {
  std::int64_t block, blocks;  // inputs
  std::int64_t vectors, subtiles;
  std::int64_t stride;  // words between one input and the next
  std::int64_t part;    // units per task
  std::int64_t tasks, chunks;

  std::pair<std::int64_t, std::int32_t> place(std::int32_t column) const {
    return {column / block, static_cast<std::int32_t>(4 * stride * (column % block))};
  }
};

// Throws Refusal where a kernel reaches too far.
ConvLayout lay_out(const Load& load, ConvShape given);
ProductLayout lay_out(const Load& load, std::int64_t cols, std::int64_t batch);

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
    if (plans_.size() < kMost)
      plans_.emplace_back(key, plan);
    else
      plans_[oldest_++ % kMost] = {key, plan};
    return plan;
  }

 private:
  static constexpr std::size_t kMost = 8;  // input shapes remembered per layer
  std::mutex mutex_;
  std::vector<std::pair<std::vector<std::int64_t>, std::shared_ptr<const Plan>>> plans_;
  std::size_t oldest_ = 0;
};

}  // namespace relrep
