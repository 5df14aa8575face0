#include "plan.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace relrep {
namespace {

constexpr std::int64_t kCacheBytes = 28 * 1024;  // of a packed block: the first-level cache less what the lists need
constexpr double kChunkCycles = 30000;           // about 10 microseconds: what is worth a thread's while
constexpr std::int64_t kMostChunks = 32;
constexpr double kMostPacking = 0.1;  // share of the time that may go into packing a tile again for each part of its units
constexpr std::int64_t kMostPacked = 1 << 26;  // floats; a kernel that reaches so far is no layer but an attack
constexpr std::int64_t kWidest = 160;  // a row of outputs up to which a tile takes whole rows

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Cycles of one pass over `cells` nonzeros of `units` units with `vectors` vectors: the constants are rough, only their order counts.
double pass_cycles(bool quads, double cells, double units, double vectors, double blocks, double runs) {
  const double cell = quads ? std::max(2.1 * vectors, 3.0) + 1.0 : std::max(0.65 * vectors, 1.5) + 0.8;
  const double rows = quads ? 4.0 : 1.0;
  const double write = rows * (vectors + (runs > 1 ? 4.0 * runs : 0.0));
  return cells * cell + units * (blocks * 12.0 + (blocks - 1) * 1.5 * rows * vectors + write);
}

// The tilings worth a look, cheapest first by the count above.
struct Chooser {
  const Weights& weights;
  const ConvShape& shape;
  const Core& core;
  std::int64_t phases, halo_h, halo_w;
  double cheapest = -1.0, packing = 0.0;  // of all tiles of one image and group
  Tiling best{};

  void consider(std::int64_t vectors, std::int64_t tile_h, std::int64_t tile_w, bool direct) {
    const std::int64_t places = vectors * core.lanes;
    Tiling t{};
    t.direct = direct;
    t.vectors = vectors;
    t.tile_h = tile_h;
    t.tile_w = tile_w;
    t.tiles_y = ceil_div(shape.out_height, tile_h);
    t.tiles_x = ceil_div(shape.out_width, tile_w);
    t.phases = phases;
    t.plane_h = tile_h + halo_h;
    t.plane_w = tile_w + halo_w;
    t.span = (tile_h - 1) * t.plane_w + tile_w;
    t.subtiles = ceil_div(t.span, places);
    t.parts = 1;
    if (direct) {
      const std::int64_t rest = shape.out_width % tile_w;
      if (tile_w < places || (rest > 0 && rest < places)) return;
    }
    const std::int64_t plane = direct ? places + 16 : phases * t.plane_h * t.plane_w;
    t.block = std::clamp<std::int64_t>(kCacheBytes / 4 / plane, 1, shape.channels);
    t.blocks = ceil_div(shape.channels, t.block);
    t.block = ceil_div(shape.channels, t.blocks);
    const double cells = static_cast<double>(weights.cells.size()) / static_cast<double>(weights.groups);
    const double runs = t.plane_w == shape.out_width ? 1.0 : static_cast<double>(places) / static_cast<double>(t.plane_w) + 1.0;
    const double tiles = static_cast<double>(t.tiles_y * t.tiles_x);
    const double pass = pass_cycles(weights.quads, cells, static_cast<double>(weights.units), static_cast<double>(vectors),
                                    static_cast<double>(t.blocks), runs);
    const double lookup = direct ? cells * 1.5 * static_cast<double>(t.subtiles) : 0.0;  // every channel on a page of its own
    const double pack = direct ? 0.0
                               : static_cast<double>(shape.channels * phases * t.plane_h) *
                                     (6.0 + 1.2 * static_cast<double>(t.plane_w) / static_cast<double>(core.lanes) *
                                                static_cast<double>(shape.stride_w > 1 ? 3 : 1));
    const double cycles = tiles * (static_cast<double>(t.subtiles) * pass + lookup + pack);
    if (cheapest < 0 || cycles < cheapest) {
      cheapest = cycles;
      packing = tiles * pack;
      best = t;
    }
  }

  void run() {
    const bool pointwise = shape.kernel_h == 1 && shape.kernel_w == 1 && shape.stride_h == 1 && shape.stride_w == 1 &&
                           shape.height == shape.out_height && shape.width == shape.out_width && shape.height == 1;
    const bool near = shape.height * shape.width <= INT32_MAX / 4 / std::max<std::int64_t>(1, shape.channels);
    for (std::int64_t vectors = 1; vectors <= (weights.quads ? core.most_quad : core.most_single); ++vectors) {
      const std::int64_t places = vectors * core.lanes;
      if (shape.out_width <= kWidest)
        for (std::int64_t h = 1; h <= std::min<std::int64_t>(shape.out_height, 64); ++h) consider(vectors, h, shape.out_width, false);
      else
        for (std::int64_t m = 1; m <= 8; m *= 2) {
          const std::int64_t w = std::min(shape.out_width, m * places);
          for (std::int64_t h = 1; h <= std::min<std::int64_t>(shape.out_height, 8); ++h) consider(vectors, h, w, false);
        }
      if (pointwise && near)
        for (std::int64_t m = 1; m <= 16; m *= 2) consider(vectors, 1, std::min(shape.out_width, m * places), true);
    }
  }
};

// Which phases (position modulo stride) the kernel's positions along one axis have, and the number of each position's phase.
struct AxisPhases {
  std::vector<std::int32_t> phases;
  std::vector<std::int64_t> number;
};

AxisPhases axis_phases(std::int64_t kernel, std::int64_t dilation, std::int64_t stride) {
  AxisPhases axis;
  std::unordered_map<std::int64_t, std::int64_t> known;
  for (std::int64_t k = 0; k < kernel; ++k) {
    const auto [at, fresh] = known.emplace(k * dilation % stride, static_cast<std::int64_t>(axis.phases.size()));
    if (fresh) axis.phases.push_back(static_cast<std::int32_t>(at->first));
    axis.number.push_back(at->second);
  }
  return axis;
}

std::int64_t chunks_for(double cycles) {
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(cycles / kChunkCycles), 1, kMostChunks);
}

// A 1x1 convolution that neither skips nor pads sees each plane as one row.
ConvShape flattened(ConvShape s) {
  if (s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 && s.pad_left == 0 &&
      s.height == s.out_height && s.width == s.out_width) {
    s.width *= s.height;
    s.out_width = s.width;
    s.height = s.out_height = 1;
  }
  return s;
}

}  // namespace

void plan_convolution(const Weights& weights, ConvShape given, const Epilogue& epilogue, const Core& core, OwnedConvPlan& out) {
  const ConvShape shape = flattened(given);
  // The planes are the phases of the stride that some kernel position falls into, along each axis.
  const AxisPhases down = axis_phases(shape.kernel_h, shape.dilation_h, shape.stride_h);
  const AxisPhases across = axis_phases(shape.kernel_w, shape.dilation_w, shape.stride_w);
  const std::int64_t wide = static_cast<std::int64_t>(across.phases.size());
  checked_product({static_cast<std::int64_t>(down.phases.size()), wide}, "the phases of the stride");
  out.phases.clear();
  for (const std::int32_t y : down.phases)
    for (const std::int32_t x : across.phases) out.phases.insert(out.phases.end(), {y, x});
  Chooser chooser{weights,
                  shape,
                  core,
                  static_cast<std::int64_t>(out.phases.size() / 2),
                  (shape.kernel_h - 1) * shape.dilation_h / shape.stride_h,
                  (shape.kernel_w - 1) * shape.dilation_w / shape.stride_w};
  chooser.run();
  Tiling tiling = chooser.best;
  const std::int64_t packed = tiling.block * tiling.phases * tiling.plane_h * tiling.plane_w;
  if (packed > kMostPacked)
    throw Refusal("the kernel reaches over " + std::to_string(tiling.plane_h) + " x " + std::to_string(tiling.plane_w) +
                  " inputs at a time, which is too much");
  const std::int64_t tiles = shape.batch * shape.groups * tiling.tiles_y * tiling.tiles_x;
  out.chunks = chunks_for(chooser.cheapest * static_cast<double>(shape.batch * shape.groups));
  const std::int64_t affordable = static_cast<std::int64_t>(kMostPacking * chooser.cheapest / std::max(chooser.packing, 1.0)) + 1;
  const std::int64_t even = tiles % 2 ? 2 * ceil_div(affordable, 2) : affordable;  // two threads are the commonest number
  tiling.parts = std::clamp<std::int64_t>(std::min(ceil_div(out.chunks, tiles), even), 1, weights.units);
  out.tasks = tiles * tiling.parts;
  out.chunks = std::min(out.chunks, out.tasks);
  const std::int64_t kernel = shape.kernel_h * shape.kernel_w;
  out.lists = order_lists(weights, tiling.blocks, [&](std::int32_t column) {
    const std::int64_t channel = column / kernel, ky = column % kernel / shape.kernel_w, kx = column % shape.kernel_w;
    const std::int64_t inside = channel % tiling.block;
    std::int64_t floats = inside * shape.height * shape.width;
    if (!tiling.direct) {
      const std::int64_t phase = down.number[static_cast<std::size_t>(ky)] * wide + across.number[static_cast<std::size_t>(kx)];
      const std::int64_t plane = inside * tiling.phases + phase;
      floats = (plane * tiling.plane_h + ky * shape.dilation_h / shape.stride_h) * tiling.plane_w +
               kx * shape.dilation_w / shape.stride_w;
    }
    return std::pair<std::int64_t, std::int32_t>(channel / tiling.block, static_cast<std::int32_t>(4 * floats));
  });
  out.view = {shape, tiling, out.phases.data(), weights.units, out.lists.view(), epilogue};
}

void plan_product(const Weights& weights, std::int64_t batch, const Epilogue& epilogue, const Core& core, OwnedGemmPlan& out) {
  GemmPlan plan{};
  plan.rows = weights.rows;
  plan.cols = weights.cols;
  plan.batch = batch;
  plan.units = weights.units;
  plan.epilogue = epilogue;
  double cheapest = -1.0;
  for (std::int64_t vectors = 1; vectors <= (weights.quads ? core.most_quad : core.most_single); ++vectors) {
    const std::int64_t places = vectors * core.lanes, subtiles = ceil_div(batch, places);
    const std::int64_t block = std::clamp<std::int64_t>(kCacheBytes / 4 / places, 1, weights.cols);
    const std::int64_t blocks = ceil_div(weights.cols, block);
    const double cycles = static_cast<double>(subtiles) *
                          pass_cycles(weights.quads, static_cast<double>(weights.cells.size()), static_cast<double>(weights.units),
                                      static_cast<double>(vectors), static_cast<double>(blocks), 1.0);
    if (cheapest < 0 || cycles < cheapest) {
      cheapest = cycles;
      plan.vectors = vectors;
      plan.subtiles = subtiles;
      plan.block = ceil_div(weights.cols, blocks);
      plan.blocks = blocks;
    }
  }
  if (batch == 1) {  // gathered, not packed: one list per unit
    plan.block = weights.cols;
    plan.blocks = 1;
    cheapest = 1.2 * static_cast<double>(weights.cells.size()) + 15.0 * static_cast<double>(weights.units);
  }
  const std::int64_t chunks = chunks_for(cheapest);
  const std::int64_t stride = batch == 1 ? 1 : plan.vectors * core.lanes;
  if (plan.block * stride > INT32_MAX / 4) throw Refusal("a row of " + std::to_string(weights.cols) + " inputs is too long");
  plan.part = std::clamp<std::int64_t>(std::min<std::int64_t>(ceil_div(plan.units * plan.subtiles, chunks), weights.quads ? 32 : 128), 1,
                                       plan.units);
  if (batch == 1) plan.part = ceil_div(plan.units, chunks);
  out.tasks = batch == 1 ? ceil_div(plan.units, plan.part) : plan.subtiles * ceil_div(plan.units, plan.part);
  out.chunks = std::min(chunks, out.tasks);
  out.lists = order_lists(weights, plan.blocks, [&](std::int32_t column) {
    return std::pair<std::int64_t, std::int32_t>(column / plan.block, static_cast<std::int32_t>(4 * stride * (column % plan.block)));
  });
  plan.nonzeros = out.lists.view();
  out.view = plan;
}

}  // namespace relrep
