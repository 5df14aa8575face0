// A weight as the file stores it, read and checked once: values and the gaps between their positions in the row-major matrix.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"

namespace relrep {

// Bad input; becomes an ONNX Runtime status.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The weights of one unit at one column; a single uses the first.
struct Cell {
  std::int32_t unit, column;
  float weight[4];
};

struct Weights {
  std::int64_t groups = 1, rows = 0, cols = 0;  // rows of all groups
  bool quads = false;
  std::int64_t units = 0;    // per group
  std::vector<Cell> cells;   // by unit (of all groups), then column
};

// Four neighbouring input channels at one position of the kernel; `column` is group of four x kernel + position.
struct Int8Cell {
  std::int32_t unit, column;
  std::int8_t weight[4];
};

struct Int8Weights {
  std::int64_t groups = 1, rows = 0, kernel = 1;
  std::int64_t inputs = 0, cols = 0;     // channels of a group; groups of four of them x kernel
  std::int64_t units = 0;                // per group
  bool wide = false;                     // some pair of products leaves int16
  std::vector<std::int64_t> sum, reach;  // by row: of the weights, and of their sizes
  std::vector<Int8Cell> cells;
};

// Throws Refusal where gaps run outside of the matrix or meet a position twice, or a value is not finite.
Weights read_weights(const float* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t rows, std::int64_t cols,
                     std::int64_t groups);
Int8Weights read_weights(const std::int8_t* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t rows,
                         std::int64_t inputs, std::int64_t kernel, std::int64_t groups);

// The product of sizes, each at least 1 and all of them together below 2^31; throws Refusal otherwise.
std::int64_t checked_product(const std::vector<std::int64_t>& sizes, const char* what);

// "a x b x c"
std::string describe(const std::vector<std::int64_t>& sizes);

// Sorts cells into lists by group, block of inputs, unit, and gives the lists' starts; `place(column)` is {block, byte offset}, and
// `put(at, cell, offset)` stores the item.
template <class Matrix, class Place, class Put>
std::vector<std::int32_t> order_lists(const Matrix& w, std::int64_t blocks, const Place& place, const Put& put) {
  const auto list_of = [&](const auto& cell, std::int64_t block) {
    return static_cast<std::size_t>(((cell.unit / w.units) * blocks + block) * w.units + cell.unit % w.units);
  };
  std::vector<std::int32_t> start(static_cast<std::size_t>(w.groups * blocks * w.units + 1), 0);
  for (const auto& cell : w.cells) ++start[list_of(cell, place(cell.column).first) + 1];
  for (std::size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
  std::vector<std::int32_t> next(start.begin(), start.end() - 1);
  for (const auto& cell : w.cells) {
    const auto [block, offset] = place(cell.column);
    put(static_cast<std::size_t>(next[list_of(cell, block)]++), cell, offset);
  }
  return start;
}

}  // namespace relrep
