#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace relrep {
namespace {

// Quads pay although up to this share of their weights are zeros in between: a multiply-add in a quad costs about that much less.
constexpr double kQuadFill = 1.33;

template <class Value>
struct Entry {
  std::int32_t row, column;
  Value weight;
};

template <class Value>
std::vector<Entry<Value>> decode(const Value* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t size,
                                 std::int64_t cols) {
  std::vector<Entry<Value>> entries;
  entries.reserve(static_cast<std::size_t>(count));
  std::int64_t position = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i > 0 && gaps[i] == 0) throw Refusal("positions: entry " + std::to_string(i) + " lies where the one before it does");
    position += gaps[i];
    if (position >= size)
      throw Refusal("positions: entry " + std::to_string(i) + " is at " + std::to_string(position) + ", the weight has " +
                    std::to_string(size) + " elements");
    if (!std::isfinite(static_cast<float>(values[i]))) throw Refusal("values: entry " + std::to_string(i) + " is not finite");
    if (values[i] != 0)
      entries.push_back({static_cast<std::int32_t>(position / cols), static_cast<std::int32_t>(position % cols), values[i]});
  }
  return entries;
}

// Cells of four rows each, or nothing where these share too few columns.
std::vector<Cell> as_quads(const std::vector<Entry<float>>& entries, std::int64_t cols) {
  std::vector<Cell> cells;
  std::vector<std::int32_t> place(static_cast<std::size_t>(cols), -1);
  const double most = kQuadFill * static_cast<double>(entries.size()) / 4;
  for (std::size_t i = 0; i < entries.size();) {
    const std::int32_t unit = entries[i].row / 4;
    const std::size_t begin = cells.size();
    for (; i < entries.size() && entries[i].row / 4 == unit; ++i) {
      std::int32_t& at = place[static_cast<std::size_t>(entries[i].column)];
      if (at < 0) {
        at = static_cast<std::int32_t>(cells.size());
        cells.push_back({unit, entries[i].column, {0, 0, 0, 0}});
        if (static_cast<double>(cells.size()) > most) return {};
      }
      cells[static_cast<std::size_t>(at)].weight[entries[i].row % 4] = entries[i].weight;
    }
    std::sort(cells.begin() + static_cast<std::ptrdiff_t>(begin), cells.end(),
              [](const Cell& a, const Cell& b) { return a.column < b.column; });
    for (std::size_t c = begin; c < cells.size(); ++c) place[static_cast<std::size_t>(cells[c].column)] = -1;
  }
  return cells;
}

// Whether a pair of products with bytes may leave int16.
bool leaves_int16(const std::int8_t* pair) {
  const int above = std::max<int>(pair[0], 0) + std::max<int>(pair[1], 0), below = std::min<int>(pair[0], 0) + std::min<int>(pair[1], 0);
  return above * 255 > INT16_MAX || below * 255 < INT16_MIN;
}

}  // namespace

std::string describe(const std::vector<std::int64_t>& sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
  return text;
}

std::int64_t checked_product(const std::vector<std::int64_t>& sizes, const char* what) {
  std::int64_t product = 1;
  for (const std::int64_t size : sizes) {
    if (size < 1 || size > INT32_MAX || (product *= size) > INT32_MAX)
      throw Refusal(std::string(what) + " is " + describe(sizes) + "; every size must be at least 1 and all together below 2^31");
  }
  return product;
}

Weights read_weights(const float* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t rows, std::int64_t cols,
                     std::int64_t groups) {
  const std::vector<Entry<float>> entries = decode(values, gaps, count, rows * cols, cols);
  Weights w;
  w.groups = groups;
  w.rows = rows;
  w.cols = cols;
  if (rows / groups % 4 == 0) w.cells = as_quads(entries, cols);
  w.quads = !w.cells.empty();
  w.units = rows / groups / (w.quads ? 4 : 1);
  if (!w.quads)
    for (const Entry<float>& entry : entries) w.cells.push_back({entry.row, entry.column, {entry.weight, 0, 0, 0}});
  return w;
}

Int8Weights read_weights(const std::int8_t* values, const std::uint8_t* gaps, std::int64_t count, std::int64_t rows,
                         std::int64_t inputs, std::int64_t kernel, std::int64_t groups) {
  Int8Weights w;
  w.groups = groups;
  w.rows = rows;
  w.kernel = kernel;
  w.inputs = inputs;
  w.cols = (inputs + 3) / 4 * kernel;
  w.units = rows / groups;
  w.sum.assign(static_cast<std::size_t>(rows), 0);
  w.reach.assign(static_cast<std::size_t>(rows), 0);
  std::vector<std::int32_t> place(static_cast<std::size_t>(w.cols), -1);  // of a column's cell, if at or behind the row's first
  std::int32_t first = 0, row = -1;
  for (const Entry<std::int8_t>& entry : decode(values, gaps, count, rows * inputs * kernel, inputs * kernel)) {
    if (entry.row != row) {
      row = entry.row;
      first = static_cast<std::int32_t>(w.cells.size());
    }
    const std::int64_t channel = entry.column / kernel, column = channel / 4 * kernel + entry.column % kernel;
    std::int32_t& at = place[static_cast<std::size_t>(column)];
    if (at < first) {
      at = static_cast<std::int32_t>(w.cells.size());
      w.cells.push_back({row, static_cast<std::int32_t>(column), {0, 0, 0, 0}});
    }
    w.cells[static_cast<std::size_t>(at)].weight[channel % 4] = entry.weight;
    w.sum[static_cast<std::size_t>(row)] += entry.weight;
    w.reach[static_cast<std::size_t>(row)] += std::abs(entry.weight);
  }
  for (const Int8Cell& cell : w.cells) w.wide = w.wide || leaves_int16(cell.weight) || leaves_int16(cell.weight + 2);
  return w;
}

}  // namespace relrep
