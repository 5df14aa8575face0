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
constexpr double kRowMoved = 8.0;  // cycles of a row of a depthwise layer, into a plane or out of it
constexpr std::int64_t kWidest = 160;  // a row of outputs up to which a tile takes whole rows

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Cycles of one pass over the nonzeros with `vectors` vectors: the constants are rough, only their order counts.
double pass_cycles(const Load& load, double vectors, double blocks, double runs) {
  const double rows = load.quads ? 4.0 : 1.0;
  const double cell = std::max(load.pace * vectors, load.quads ? 3.0 : 1.5) + (load.quads ? 1.0 : 0.8);
  const double write = rows * (vectors + (runs > 1 ? 4.0 * runs : 0.0));
  const double cells = static_cast<double>(load.cells) / static_cast<double>(load.groups);
  return cells * cell + static_cast<double>(load.units) * (blocks * 12.0 + (blocks - 1) * 1.5 * rows * vectors + write);
}

// The tilings worth a look, cheapest first by the count above.
struct Chooser {
  const Load& load;
  const ConvShape& shape;
  std::int64_t phases, halo_h, halo_w;
  double cheapest = -1.0, packing = 0.0;  // of all tiles of one image and group
  Tiling best{};

  void consider(std::int64_t vectors, std::int64_t tile_h, std::int64_t tile_w, bool direct) {
    const std::int64_t places = vectors * load.lanes;
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
    const double cells = static_cast<double>(load.cells) / static_cast<double>(load.groups);
    const double runs = t.plane_w == shape.out_width ? 1.0 : static_cast<double>(places) / static_cast<double>(t.plane_w) + 1.0;
    const double tiles = static_cast<double>(t.tiles_y * t.tiles_x);
    const double pass = pass_cycles(load, static_cast<double>(vectors), static_cast<double>(t.blocks), runs);
    const double lookup = direct ? cells * 1.5 * static_cast<double>(t.subtiles) : 0.0;  // every channel on a page of its own
    const double pack = direct ? 0.0
                               : static_cast<double>(shape.channels * phases * t.plane_h) *
                                     (6.0 + 1.2 * static_cast<double>(t.plane_w) / static_cast<double>(load.lanes) *
                                                static_cast<double>(shape.stride_w > 1 ? 3 : 1));
    const double cycles = tiles * (static_cast<double>(t.subtiles) * pass + lookup + pack);
    if (cheapest < 0 || cycles < cheapest) {
      cheapest = cycles;
      packing = tiles * pack;
      best = t;
    }
  }

  // A channel of its own: whole rows, as many as the cache holds, in vectors that fit them best.
  void run_depthwise() {
    Tiling& t = best = {};
    t.phases = phases;
    t.tile_w = shape.out_width;
    t.plane_w = t.tile_w + halo_w;
    t.tile_h = std::clamp<std::int64_t>(kCacheBytes / 8 / (phases * t.plane_w) - halo_h, 1, shape.out_height);
    t.plane_h = t.tile_h + halo_h;
    t.span = (t.tile_h - 1) * t.plane_w + t.tile_w;
    t.tiles_x = t.block = t.blocks = t.parts = 1;
    t.tiles_y = ceil_div(shape.out_height, t.tile_h);
    const double cells = static_cast<double>(load.cells) / static_cast<double>(load.groups);
    for (std::int64_t vectors = 1; vectors <= load.most; ++vectors) {
      const std::int64_t passes = ceil_div(t.span, vectors * load.lanes);
      const double pass = cells * (std::max(load.pace * static_cast<double>(vectors), 2.0) + 1.0) + static_cast<double>(vectors) + 4.0;
      const double cycles = static_cast<double>(t.tiles_y * passes) * pass;
      if (cheapest < 0 || cycles < cheapest) {
        cheapest = cycles;
        t.vectors = vectors;
        t.subtiles = passes;
      }
    }
    packing = static_cast<double>(t.tiles_y * (phases * t.plane_h + t.tile_h)) * kRowMoved;
    cheapest += packing;
  }

  void run() {
    if (load.floats && is_depthwise(shape)) return run_depthwise();
    const bool pointwise = load.floats && shape.kernel_h == 1 && shape.kernel_w == 1 && shape.stride_h == 1 && shape.stride_w == 1 &&
                           shape.height == shape.out_height && shape.width == shape.out_width && shape.height == 1;
    const bool near = shape.height * shape.width <= INT32_MAX / 4 / std::max<std::int64_t>(1, shape.channels);
    for (std::int64_t vectors = 1; vectors <= load.most; ++vectors) {
      const std::int64_t places = vectors * load.lanes;
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

ConvLayout lay_out(const Load& load, ConvShape given) {
  ConvLayout out;
  out.shape = flattened(given);
  const ConvShape& shape = out.shape;
  // The planes are the phases of the stride that some kernel position falls into, along each axis.
  out.down = axis_phases(shape.kernel_h, shape.dilation_h, shape.stride_h);
  out.across = axis_phases(shape.kernel_w, shape.dilation_w, shape.stride_w);
  checked_product({static_cast<std::int64_t>(out.down.phases.size()), static_cast<std::int64_t>(out.across.phases.size())},
                  "the phases of the stride");
  for (const std::int32_t y : out.down.phases)
    for (const std::int32_t x : out.across.phases) out.phases.insert(out.phases.end(), {y, x});
  Chooser chooser{load,
                  shape,
                  static_cast<std::int64_t>(out.phases.size() / 2),
                  (shape.kernel_h - 1) * shape.dilation_h / shape.stride_h,
                  (shape.kernel_w - 1) * shape.dilation_w / shape.stride_w};
  chooser.run();
  Tiling& tiling = out.tiling = chooser.best;
  const std::int64_t packed = tiling.block * tiling.phases * tiling.plane_h * tiling.plane_w;
  if (packed > kMostPacked)
    throw Refusal("the kernel reaches over " + std::to_string(tiling.plane_h) + " x " + std::to_string(tiling.plane_w) +
                  " inputs at a time, which is too much");
  const std::int64_t tiles = shape.batch * shape.groups * tiling.tiles_y * tiling.tiles_x;
  out.chunks = chunks_for(chooser.cheapest * static_cast<double>(shape.batch * shape.groups));
  const std::int64_t affordable = static_cast<std::int64_t>(kMostPacking * chooser.cheapest / std::max(chooser.packing, 1.0)) + 1;
  const std::int64_t even = tiles % 2 ? 2 * ceil_div(affordable, 2) : affordable;  // two threads are the commonest number
  tiling.parts = std::clamp<std::int64_t>(std::min(ceil_div(out.chunks, tiles), even), 1, load.units);
  out.tasks = tiles * tiling.parts;
  out.chunks = std::min(out.chunks, out.tasks);
  return out;
}

std::pair<std::int64_t, std::int32_t> ConvLayout::place(std::int32_t column) const {
  const std::int64_t kernel = shape.kernel_h * shape.kernel_w;
  const std::int64_t channel = column / kernel, ky = column % kernel / shape.kernel_w, kx = column % shape.kernel_w;
  const std::int64_t inside = channel % tiling.block;
  std::int64_t words = inside * shape.height * shape.width;
  if (!tiling.direct) {
    const std::int64_t phase = down.number[static_cast<std::size_t>(ky)] * static_cast<std::int64_t>(across.phases.size()) +
                               across.number[static_cast<std::size_t>(kx)];
    const std::int64_t plane = inside * tiling.phases + phase;
    words = (plane * tiling.plane_h + ky * shape.dilation_h / shape.stride_h) * tiling.plane_w +
            kx * shape.dilation_w / shape.stride_w;
  }
  return {channel / tiling.block, static_cast<std::int32_t>(4 * words)};
}

ProductLayout lay_out(const Load& load, std::int64_t cols, std::int64_t batch) {
  ProductLayout out{};
  double cheapest = -1.0;
  for (std::int64_t vectors = 1; vectors <= load.most; ++vectors) {
    const std::int64_t places = vectors * load.lanes, subtiles = ceil_div(batch, places);
    const std::int64_t block = std::clamp<std::int64_t>(kCacheBytes / 4 / places, 1, cols);
    const std::int64_t blocks = ceil_div(cols, block);
    const double cycles =
        static_cast<double>(subtiles) * pass_cycles(load, static_cast<double>(vectors), static_cast<double>(blocks), 1.0);
    if (cheapest < 0 || cycles < cheapest) {
      cheapest = cycles;
      out.vectors = vectors;
      out.subtiles = subtiles;
      out.block = ceil_div(cols, blocks);
      out.blocks = blocks;
    }
  }
  if (batch == 1) {  // gathered, not packed: one list per unit
    out.block = cols;
    out.blocks = 1;
    cheapest = 1.2 * static_cast<double>(load.cells) + 15.0 * static_cast<double>(load.units);
  }
  const std::int64_t chunks = chunks_for(cheapest);
  out.stride = batch == 1 ? 1 : out.vectors * load.lanes;
  if (out.block * out.stride > INT32_MAX / 4) throw Refusal("a row of " + std::to_string(cols) + " inputs is too long");
  out.part = std::clamp<std::int64_t>(std::min<std::int64_t>(ceil_div(load.units * out.subtiles, chunks), load.quads ? 32 : 128), 1,
                                      load.units);
  if (batch == 1) out.part = ceil_div(load.units, chunks);
  out.tasks = batch == 1 ? ceil_div(load.units, out.part) : out.subtiles * ceil_div(load.units, out.part);
  out.chunks = std::min(chunks, out.tasks);
  return out;
}

}  // namespace relrep
