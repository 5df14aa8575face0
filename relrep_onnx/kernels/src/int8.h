// The int8 counterpart of core.h: uint8 activations, int8 weights, sums in int32, uint8 results.
//
// A place holds four neighbouring input channels, a byte each, so that tiles, planes and offsets are those of the float kernels
// with a quarter of the channels, and one nonzero is four weights: one dot product of four per lane.  1x4 blocks along the input
// channels fill it.  Sums are exact: no row's can leave int32 (checked when the file is read).
#pragma once

#include "core.h"

namespace relrep {

struct Block {
  std::int32_t weight;  // four int8, the first channel's lowest
  std::int32_t offset;
};

// Lists of nonzeros, ordered as in `Nonzeros`; a unit is one output channel.
struct Blocks {
  bool wide;  // a pair of products may leave int16
  const std::int32_t* start;
  const Block* block;
};

// y = clamp(round(sum * scale)) + zero_point; round to even, low and high less the zero point.
struct Requantize {
  const std::int32_t* bias;  // per output channel, with all that zero points add
  const float* scale;
  float low, high;
  std::int32_t zero_point;
};

struct Int8ConvPlan {
  ConvShape shape;      // channels: groups of four
  std::int64_t inputs;  // channels of one group of the convolution
  Tiling tiling;
  const std::int32_t* phase;
  std::int64_t units;
  std::uint8_t padding;  // X's zero point
  Blocks blocks;
  Requantize requantize;
};

struct Int8GemmPlan {
  std::int64_t rows, inputs, cols, batch;  // cols: groups of four inputs
  std::int64_t block, blocks;
  std::int64_t vectors, subtiles;
  std::int64_t part;  // units per task
  Blocks nonzeros;
  Requantize requantize;
};

struct Int8Core {
  int lanes;
  int most;                // vectors of places held at a time
  std::int32_t less;       // the loops compute with X less this, so that a signed product serves
  bool (*supported)();
  // As in `Core`; scratch is in words of four bytes.
  void (*conv)(const Int8ConvPlan&, const std::uint8_t* x, std::uint8_t* y, std::int64_t first, std::int64_t last, void* scratch);
  void (*pack)(const Int8GemmPlan&, const std::uint8_t* x, void* packed, std::int64_t first, std::int64_t last);
  void (*gemm)(const Int8GemmPlan&, const void* packed, std::uint8_t* y, std::int64_t first, std::int64_t last, void* scratch);
  // One row of X, its end filled up to whole groups of four.
  void (*gemv)(const Int8GemmPlan&, const std::uint8_t* x, std::uint8_t* y, std::int64_t first, std::int64_t last);
};

inline std::int64_t conv_scratch(const Int8ConvPlan& plan, std::int64_t lanes) {
  const Tiling& t = plan.tiling;
  const std::int64_t sums = t.blocks > 1 ? t.subtiles * t.vectors * lanes * plan.shape.rows : 0;
  return t.block * t.phases * t.plane_h * t.plane_w + sums + 2 * kSlack;
}

inline std::int64_t gemm_scratch(const Int8GemmPlan& plan, std::int64_t lanes) {
  return 2 * plan.part * plan.vectors * lanes + kSlack;
}

extern const Int8Core kInt8Portable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Int8Core kInt8Avx2;
extern const Int8Core kInt8AvxVnni;
extern const Int8Core kInt8Avx512Vnni;
#elif defined(__aarch64__)
extern const Int8Core kInt8Dotprod;
#endif

}  // namespace relrep
