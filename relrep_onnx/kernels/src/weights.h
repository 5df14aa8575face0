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

// Throws Refusal where gaps run outside of the matrix or meet a position twice, or a value is not finite.
Weights read_weights(const float* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t rows, std::int64_t cols,
                     std::int64_t groups);

// The product of sizes, each at least 1 and all of them together below 2^31; throws Refusal otherwise.
std::int64_t checked_product(const std::vector<std::int64_t>& sizes, const char* what);

// "a x b x c"
std::string describe(const std::vector<std::int64_t>& sizes);

// Lists of nonzeros in the order core.h wants, with the memory behind them.
struct NonzeroLists {
  std::vector<std::int32_t> start;
  std::vector<Single> single;
  std::vector<Quad> quad;

  Nonzeros view() const { return {!quad.empty(), start.data(), single.data(), quad.data()}; }
};

// `place(column)` gives {block, byte offset}.
template <class Place>
NonzeroLists order_lists(const Weights& w, std::int64_t blocks, const Place& place) {
  NonzeroLists lists;
  const auto list_of = [&](const Cell& cell, std::int64_t block) {
    return ((cell.unit / w.units) * blocks + block) * w.units + cell.unit % w.units;
  };
  lists.start.assign(static_cast<std::size_t>(w.groups * blocks * w.units + 1), 0);
  for (const Cell& cell : w.cells) ++lists.start[static_cast<std::size_t>(list_of(cell, place(cell.column).first) + 1)];
  for (std::size_t i = 1; i < lists.start.size(); ++i) lists.start[i] += lists.start[i - 1];
  std::vector<std::int32_t> next(lists.start.begin(), lists.start.end() - 1);
  if (w.quads)
    lists.quad.resize(w.cells.size());
  else
    lists.single.resize(w.cells.size());
  for (const Cell& cell : w.cells) {
    const auto [block, offset] = place(cell.column);
    const std::size_t at = static_cast<std::size_t>(next[static_cast<std::size_t>(list_of(cell, block))]++);
    if (w.quads)
      lists.quad[at] = {offset, {cell.weight[0], cell.weight[1], cell.weight[2], cell.weight[3]}};
    else
      lists.single[at] = {cell.weight[0], offset};
  }
  return lists;
}

}  // namespace relrep
