// What the rest of the library and the inner loops of one instruction set tell each other: plain structs, no ownership.
//
// Convolution.  The input of one tile of outputs is packed, a block of channels at a time, into planes that stay in the first-level
// cache; a strided convolution gets one plane per phase of its stride.  In a plane the outputs of a tile lie at consecutive places
// (a row of outputs, then the few places of its halo, then the next row), so one nonzero weight is one broadcast and one
// multiply-add per vector of places at a fixed byte offset.
// Matrix product.  The places are the rows of X, packed as planes of one input each; a single row is a plain gather.
//
// "Unit": what shares a list of nonzeros: one output channel, or four neighbours whose nonzeros lie at the same positions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace relrep {

struct Single {
  float weight;
  std::int32_t offset;
};

struct Quad {
  std::int32_t offset;
  float weight[4];
};

// Lists of nonzeros, ordered by group, block of inputs, unit: list i is [start[i], start[i + 1]).
struct Nonzeros {
  bool quads;
  const std::int32_t* start;
  const Single* single;
  const Quad* quad;
};

struct Epilogue {
  const float* bias;  // one per output channel
  float low, high;
};

struct ConvShape {
  std::int64_t batch, groups, channels, rows;  // channels and rows (output channels) of one group
  std::int64_t height, width, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
};

// Every channel by itself, with one output channel.
inline bool is_depthwise(const ConvShape& s) { return s.channels == 1 && s.rows == 1; }

struct Tiling {
  bool direct;                       // 1x1 on whole planes: read X where it lies
  std::int64_t tile_h, tile_w;       // outputs of a tile
  std::int64_t tiles_y, tiles_x;
  std::int64_t plane_h, plane_w;     // one packed plane
  std::int64_t phases;               // planes per channel
  std::int64_t block, blocks;        // channels packed at a time
  std::int64_t vectors, subtiles;    // vectors held in registers; passes over a tile's places
  std::int64_t span;                 // places from a tile's first output to its last, both included
  std::int64_t parts;                // a tile's units are split into so many tasks
};

struct ConvPlan {
  ConvShape shape;
  Tiling tiling;
  const std::int32_t* phase;  // [phases][2]: row and column phase
  std::int64_t units;         // per group
  Nonzeros nonzeros;
  Epilogue epilogue;
};

struct GemmPlan {
  std::int64_t rows, cols, batch;  // of W; rows of X
  std::int64_t block, blocks;      // inputs per block
  std::int64_t vectors, subtiles;
  std::int64_t units, part;        // units per task
  Nonzeros nonzeros;
  Epilogue epilogue;
};

struct Core {
  int lanes;
  int most_single, most_quad;  // vectors of places held at a time
  bool (*supported)();
  // Tasks [first, last) of a convolution; scratch as large as conv_scratch() says, aligned to 64 bytes.
  void (*conv)(const ConvPlan&, const float* x, const float* residual, float* y, std::int64_t first, std::int64_t last, float* scratch);
  // Rows of X into planes; subtiles [first, last).
  void (*pack)(const GemmPlan&, const float* x, float* packed, std::int64_t first, std::int64_t last);
  void (*gemm)(const GemmPlan&, const float* packed, const float* residual, float* y, std::int64_t first, std::int64_t last,
               float* scratch);
  // One row of X: units [first, last).
  void (*gemv)(const GemmPlan&, const float* x, const float* residual, float* y, std::int64_t first, std::int64_t last);
};

constexpr std::int64_t kMostLanes = 16;
constexpr std::int64_t kMostVectors = 16;
constexpr std::int64_t kSlack = kMostLanes * (kMostVectors + 1);  // floats behind a packed block that vectors may read

// Words of scratch that one task needs.
inline std::int64_t conv_scratch(const ConvPlan& plan, std::int64_t lanes) {
  const Tiling& t = plan.tiling;
  const std::int64_t packed = t.direct ? 0 : t.block * t.phases * t.plane_h * t.plane_w + kSlack;
  const std::int64_t sums = t.blocks > 1 || is_depthwise(plan.shape) ? t.subtiles * t.vectors * lanes * plan.shape.rows : 0;
  return packed + sums + kSlack;
}

inline std::int64_t gemm_scratch(const GemmPlan& plan, std::int64_t lanes) {
  return plan.part * (plan.nonzeros.quads ? 4 : 1) * plan.vectors * lanes + kSlack;
}

extern const Core kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Core kAvx2;
extern const Core kAvx512;
#endif

}  // namespace relrep
