// The inner loops of the int8 kernels, compiled once per instruction set by the int8_*.cpp that include this file, as core.inl is.
//
// The including file has defined, besides macros: `Int`, a vector of int32, and two structs `Narrow` and `Wide` with
//   Weight from(Int)                 weights of every lane, ready
//   Int add(Int sum, Int x, Weight)  sum + x0 w0 + x1 w1 + x2 w2 + x3 w3 per lane; uint8 x, int8 w
// where `Narrow` may overflow if a pair of products leaves int16, and both compute with x less RELREP_LESS; and
//   void put_bytes(uint8* to, Int v)  the lanes, each between 0 and 255
#include "bytes.inl"
#include "int8.h"
#include "tiles.inl"

namespace relrep {
namespace {

constexpr std::int64_t kLanes = RELREP_LANES;

typedef float Float __attribute__((vector_size(RELREP_LANES * 4)));
typedef std::int32_t LooseInt __attribute__((vector_size(RELREP_LANES * 4), aligned(4), may_alias));

inline Int load(const void* p) { return *static_cast<const LooseInt*>(p); }
inline void store(void* p, Int v) { *static_cast<LooseInt*>(p) = v; }
inline Int spread(std::int32_t v) { return v - Int{}; }

inline void fill(std::uint32_t* to, std::uint32_t value, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

// To bytes, as QLinearConv rounds: adding 1.5 * 2^23 leaves the nearest even integer in a float's last bits.
inline void finish(Int sum, float scale, const Requantize& r, std::uint8_t* to) {
  constexpr float kMagic = 12582912.0f;
  const Float low = r.low - Float{}, high = r.high - Float{};
  Float v = __builtin_convertvector(sum, Float) * scale;
  v = v < low ? low : v;
  v = v > high ? high : v;
  v += kMagic;
  put_bytes(to, (Int)v - (0x4B400000 - r.zero_point));
}

// acc[t] += dot products of one list of nonzeros; few vectors sum into several sets, as in core.inl.
template <class Dot, int NT>
inline __attribute__((always_inline)) void accumulate(const Block* at, const Block* end, const char* base, Int* acc) {
  constexpr int kSets = NT >= 6 ? 1 : NT >= 3 ? 2 : 4;
  Int part[kSets][NT];
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) part[0][t] = acc[t];
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) part[s][t] = Int{};
  for (; end - at >= kSets; at += kSets)
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      const char* from = base + at[s].offset;
      const auto w = Dot::from(spread(at[s].weight));
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) part[s][t] = Dot::add(part[s][t], load(from + t * kLanes * 4), w);
    }
  if (kSets > 1)
    for (; at < end; ++at) {
      const char* from = base + at->offset;
      const auto w = Dot::from(spread(at->weight));
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) part[0][t] = Dot::add(part[0][t], load(from + t * kLanes * 4), w);
    }
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) part[0][t] += part[s][t];
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) acc[t] = part[0][t];
}

// One pass: `NT` vectors of places, some units, one block of channels.
struct Pass {
  const char* base;           // packed X at the pass's first place
  const std::int32_t* start;  // lists of this block
  std::int64_t first, last;   // units
  bool opens, closes;         // first block: from the bias; last block: to Y
  std::int32_t* sums;         // [units][NT * lanes] between blocks
  std::int64_t channel;       // before the group's first unit
  std::uint8_t* y;            // the first unit's channel
  std::int64_t y_stride;
  const Run* runs;
  std::int64_t run_count;
};

template <class Dot, int NT>
void sum_pass(const Block* blocks, const Requantize& finishing, const Pass& given) {
  const Pass p = given;  // copies, which no write can change
  const Requantize requantize = finishing;
  const bool whole = p.run_count == 1 && p.runs[0].place == 0 && p.runs[0].count == NT * kLanes;
  std::uint8_t places[NT * kLanes];
  for (std::int64_t unit = p.first; unit < p.last; ++unit) {
    Int acc[NT];
    std::int32_t* sums = p.sums + (unit - p.first) * NT * kLanes;
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) acc[t] = p.opens ? spread(requantize.bias[p.channel + unit]) : load(sums + t * kLanes);
    accumulate<Dot, NT>(blocks + p.start[unit], blocks + p.start[unit + 1], p.base, acc);
    if (!p.closes) {
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) store(sums + t * kLanes, acc[t]);
      continue;
    }
    std::uint8_t* y = p.y + (unit - p.first) * p.y_stride;
    std::uint8_t* to = whole ? y + p.runs[0].y : places;
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) finish(acc[t], requantize.scale[p.channel + unit], requantize, to + t * kLanes);
    if (!whole)
      for (std::int64_t i = 0; i < p.run_count; ++i)
        __builtin_memcpy(y + p.runs[i].y, places + p.runs[i].place, static_cast<std::size_t>(p.runs[i].count));
  }
}

using SumPass = void (*)(const Block*, const Requantize&, const Pass&);

template <class Dot, int NT>
struct SumPasses {
  static SumPass find(std::int64_t vectors) { return vectors == NT ? &sum_pass<Dot, NT> : SumPasses<Dot, NT - 1>::find(vectors); }
};
template <class Dot>
struct SumPasses<Dot, 1> {
  static SumPass find(std::int64_t) { return &sum_pass<Dot, 1>; }
};

inline SumPass find_pass(const Blocks& blocks, std::int64_t vectors) {
  return blocks.wide ? SumPasses<Wide, RELREP_MOST>::find(vectors) : SumPasses<Narrow, RELREP_MOST>::find(vectors);
}

// ------------------------------------------------------------------------------------------------------------- convolution

// Four channels' bytes side by side, `stride` apart; `left` bytes may be read from each on.  Up to 15 words behind the last are
// written too: the next row and the slack come there.
inline void interleave(std::uint32_t* to, const std::uint8_t* const* row, std::int64_t stride, std::int64_t n, std::int64_t left) {
  std::int64_t i = 0;
  if (stride == 1) {
    for (; i < n && i + kWoven <= left; i += kWoven) weave(to + i, row, i);
  } else if (stride == 2) {
    for (; i < n && 2 * (i + kWoven) <= left; i += kWoven) weave_even(to + i, row, 2 * i);
  }
  for (; i < n; ++i) {
    const std::int64_t at = stride * i;
    to[i] = static_cast<std::uint32_t>(row[0][at] | row[1][at] << 8 | row[2][at] << 16) | static_cast<std::uint32_t>(row[3][at]) << 24;
  }
}

// Channels [first, last) of one group; missing ones at its end repeat the last, whose weights are zero there.
void pack_block(const Int8ConvPlan& plan, const std::uint8_t* x, const std::uint8_t* x_end, std::int64_t first, std::int64_t last,
                std::int64_t oy, std::int64_t ox, std::uint32_t* to) {
  const ConvShape s = plan.shape;
  const Tiling t = plan.tiling;
  const std::uint32_t padding = plan.padding * 0x01010101u;
  for (std::int64_t c = first; c < last; c += 4)
    for (std::int64_t f = 0; f < t.phases; ++f) {
      const std::int64_t y0 = oy * s.stride_h + plan.phase[2 * f] - s.pad_top;
      const std::int64_t x0 = ox * s.stride_w + plan.phase[2 * f + 1] - s.pad_left;
      const auto [begin, end] = find_inside(x0, s.stride_w, t.plane_w, s.width);
      for (std::int64_t r = 0; r < t.plane_h; ++r, to += t.plane_w) {
        const std::int64_t iy = y0 + r * s.stride_h;
        if (iy < 0 || iy >= s.height || begin >= end) {
          fill(to, padding, t.plane_w);
          continue;
        }
        const std::int64_t column = x0 + begin * s.stride_w;
        const std::uint8_t* row[4];
        for (std::int64_t k = 0; k < 4; ++k) row[k] = x + (least(c + k, last - 1) * s.height + iy) * s.width + column;
        fill(to, padding, begin);
        interleave(to + begin, row, s.stride_w, end - begin, x_end - row[3]);
        fill(to + end, padding, t.plane_w - end);
      }
    }
}

void conv(const Int8ConvPlan& plan, const std::uint8_t* x, std::uint8_t* y, std::int64_t first, std::int64_t last, void* scratch) {
  const ConvShape& s = plan.shape;
  const Tiling& t = plan.tiling;
  const std::int64_t in_plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const SumPass pass = find_pass(plan.blocks, t.vectors);
  const std::int64_t places = t.vectors * kLanes;
  std::uint32_t* packed = static_cast<std::uint32_t*>(scratch);
  std::int32_t* sums = static_cast<std::int32_t*>(scratch) + t.block * t.phases * t.plane_h * t.plane_w + kSlack;
  Run runs[kMostLanes * kMostVectors];
  for (std::int64_t task = first; task < last; ++task) {
    const auto [part, image, group, oy, ox, rows, cols, span] = find_spot(s, t, task);
    Pass p;
    p.first = plan.units * part / t.parts;
    p.last = plan.units * (part + 1) / t.parts;
    p.channel = group * s.rows;
    p.y = y + (image * s.rows + p.first) * out_plane;
    p.y_stride = out_plane;
    p.runs = runs;
    for (std::int64_t b = 0; b < t.blocks; ++b) {
      pack_block(plan, x + image * plan.inputs * in_plane, x + s.batch * s.groups * plan.inputs * in_plane, 4 * b * t.block,
                 least(4 * (b + 1) * t.block, plan.inputs), oy, ox, packed);
      p.start = plan.blocks.start + (group * t.blocks + b) * plan.units;
      p.opens = b == 0;
      p.closes = b == t.blocks - 1;
      for (std::int64_t i = 0; i < t.subtiles && i * places < span; ++i) {
        p.base = reinterpret_cast<const char*>(packed + i * places);
        p.sums = sums + i * (p.last - p.first) * places;
        p.run_count = find_runs(s, t, oy, ox, rows, cols, i * places, places, runs);
        pass(plan.blocks.block, plan.requantize, p);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ matrix product

void gemm_pack(const Int8GemmPlan& plan, const std::uint8_t* x, void* packed, std::int64_t first, std::int64_t last) {
  const std::int64_t places = plan.vectors * kLanes;
  for (std::int64_t i = first; i < last; ++i) {
    std::uint32_t* to = static_cast<std::uint32_t*>(packed) + i * plan.cols * places;
    const std::int64_t row = i * places, rows = least(places, plan.batch - row);
    for (std::int64_t k = 0; k < plan.cols; ++k, to += places) {
      const std::size_t there = static_cast<std::size_t>(least(4, plan.inputs - 4 * k));
      for (std::int64_t r = 0; r < rows; ++r) {
        to[r] = 0;
        __builtin_memcpy(to + r, x + (row + r) * plan.inputs + 4 * k, there);
      }
      fill(to + rows, 0, places - rows);
    }
  }
}

void gemm(const Int8GemmPlan& plan, const void* packed, std::uint8_t* y, std::int64_t first, std::int64_t last, void* scratch) {
  const SumPass pass = find_pass(plan.nonzeros, plan.vectors);
  const std::int64_t places = plan.vectors * kLanes, parts = (plan.rows + plan.part - 1) / plan.part;
  std::int32_t* sums = static_cast<std::int32_t*>(scratch);
  std::uint8_t* columns = reinterpret_cast<std::uint8_t*>(sums + plan.part * places);
  const Run run{0, 0, places};
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t subtile = task / parts, part = task % parts;
    Pass p;
    p.first = part * plan.part;
    p.last = least(plan.rows, p.first + plan.part);
    p.channel = 0;
    p.sums = sums;
    p.y = columns;
    p.y_stride = places;
    p.runs = &run;
    p.run_count = 1;
    for (std::int64_t b = 0; b < plan.blocks; ++b) {
      p.base = static_cast<const char*>(packed) + (subtile * plan.cols + b * plan.block) * places * 4;
      p.start = plan.nonzeros.start + b * plan.rows;
      p.opens = b == 0;
      p.closes = b == plan.blocks - 1;
      pass(plan.nonzeros.block, plan.requantize, p);
    }
    const std::int64_t row = subtile * places, rows = least(places, plan.batch - row);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = p.first; c < p.last; ++c) y[(row + r) * plan.rows + c] = columns[(c - p.first) * places + r];
  }
}

// Lanes are nonzeros here.
void gemv(const Int8GemmPlan& plan, const std::uint8_t* x, std::uint8_t* y, std::int64_t first, std::int64_t last) {
  const Requantize& r = plan.requantize;
  for (std::int64_t unit = first; unit < last; ++unit) {
    const Block* at = plan.nonzeros.block + plan.nonzeros.start[unit];
    const Block* end = plan.nonzeros.block + plan.nonzeros.start[unit + 1];
    Int sum{};
    while (at < end) {
      Int inputs{}, weights{};
      for (std::int64_t lane = 0; lane < kLanes && at < end; ++lane, ++at) {
        std::int32_t input;
        __builtin_memcpy(&input, x + at->offset, 4);
        inputs[lane] = input;
        weights[lane] = at->weight;
      }
      sum = Wide::add(sum, inputs, Wide::from(weights));
    }
    std::int32_t total = r.bias[unit];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
    std::uint8_t bytes[kLanes];
    finish(spread(total), r.scale[unit], r, bytes);
    y[unit] = bytes[0];
  }
}

bool supported() { return RELREP_SUPPORTED; }

}  // namespace

extern const Int8Core RELREP_CORE;
const Int8Core RELREP_CORE = {RELREP_LANES, RELREP_MOST, RELREP_LESS, supported, conv, gemm_pack, gemm, gemv};

}  // namespace relrep
