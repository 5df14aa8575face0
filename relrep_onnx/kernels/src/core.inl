// The inner loops, compiled once per instruction set by the core_*.cpp that include this file; vectors are those of the compiler.
// Nothing here may come from the standard library: the linker would share such code with processors that lack the instructions.
#include "core.h"
#include "tiles.inl"

namespace relrep {
namespace {

constexpr std::int64_t kLanes = RELREP_LANES;

typedef float Vec __attribute__((vector_size(RELREP_LANES * 4)));
typedef float LooseVec __attribute__((vector_size(RELREP_LANES * 4), aligned(4), may_alias));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16)));

inline Vec load(const void* p) { return *static_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec spread(float v) { return v - Vec{}; }

inline float clamp(float v, const Epilogue& e) { return v < e.low ? e.low : v > e.high ? e.high : v; }

// NaN passes, as it does in Relu and Clip.
inline Vec clamp(Vec v, const Epilogue& e) {
  const Vec low = spread(e.low), high = spread(e.high);
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Ends of rows are done by one more vector that overlaps the one before.
inline void copy(float* to, const float* from, std::int64_t n) {
  std::int64_t i = 0;
  if (n >= kLanes) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    store(to + n - kLanes, load(from + n - kLanes));
  } else if (n >= 4) {
    const Four last = *reinterpret_cast<const LooseFour*>(from + n - 4);
    for (; i + 4 <= n; i += 4) *reinterpret_cast<LooseFour*>(to + i) = *reinterpret_cast<const LooseFour*>(from + i);
    *reinterpret_cast<LooseFour*>(to + n - 4) = last;
  } else {
    for (; i < n; ++i) to[i] = from[i];
  }
}

inline void zero(float* to, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

// acc[t] += sum of weight * base[offset], for one list of nonzeros.  Few vectors alone would wait for each other, so these sum
// into several sets that are added at the end.
template <int NT>
inline __attribute__((always_inline)) void accumulate(const Single* at, const Single* end, const char* base, Vec* acc) {
  constexpr int kSets = NT >= 6 ? 1 : NT >= 3 ? 2 : 4;
  Vec part[kSets][NT];
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) part[0][t] = acc[t];
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) part[s][t] = Vec{};
  for (; end - at >= kSets; at += kSets)
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      const char* from = base + at[s].offset;
      const Vec w = spread(at[s].weight);
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) part[s][t] += w * load(from + t * kLanes * 4);
    }
  if (kSets > 1)
    for (; at < end; ++at) {
      const char* from = base + at->offset;
      const Vec w = spread(at->weight);
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) part[0][t] += w * load(from + t * kLanes * 4);
    }
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) part[0][t] += part[s][t];
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) acc[t] = part[0][t];
}

// The same for four output channels: one load serves four multiply-adds.
template <int NT>
inline __attribute__((always_inline)) void accumulate(const Quad* at, const Quad* end, const char* base, Vec* acc) {
  Vec part[4 * NT];
#pragma GCC unroll 32
  for (int i = 0; i < 4 * NT; ++i) part[i] = acc[i];
  for (; at < end; ++at) {
    const char* from = base + at->offset;
    Vec x[NT];
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) x[t] = load(from + t * kLanes * 4);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Vec w = spread(at->weight[r]);
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) part[r * NT + t] += w * x[t];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < 4 * NT; ++i) acc[i] = part[i];
}

template <class Item>
struct Kind;
template <>
struct Kind<Single> {
  static constexpr int kRows = 1, kMost = RELREP_MOST_SINGLE;
  static const Single* items(const Nonzeros& n) { return n.single; }
};
template <>
struct Kind<Quad> {
  static constexpr int kRows = 4, kMost = RELREP_MOST_QUAD;
  static const Quad* items(const Nonzeros& n) { return n.quad; }
};

// ------------------------------------------------------------------------------------------------------------- convolution

// One pass of a tile: `NT` vectors of places, every unit of the task, one block of channels.
struct Pass {
  const char* base;            // X (packed) at the pass's first place
  const std::int32_t* start;   // lists of this block
  std::int64_t first, last;    // units
  bool opens, closes;          // first block: from the bias; last block: to Y
  float* sums;                 // [rows][NT * lanes] between blocks
  const float* bias;           // of this group
  const float* residual;       // null, or as Y
  float* y;                    // this group's first channel
  std::int64_t y_stride;       // between channels
  const Run* runs;
  std::int64_t run_count;
};

inline Vec finish(Vec v, const float* residual, const Epilogue& e) { return clamp(residual ? v + load(residual) : v, e); }

inline Four finish_four(const float* from, const float* residual, const Epilogue& e) {
  Four v = *reinterpret_cast<const LooseFour*>(from);
  if (residual) v += *reinterpret_cast<const LooseFour*>(residual);
  const Four low = e.low - Four{}, high = e.high - Four{};
  v = v < low ? low : v;
  return v > high ? high : v;
}

inline void write(const float* from, const float* residual, float* y, std::int64_t n, const Epilogue& e) {
  const auto shifted = [residual](std::int64_t i) { return residual ? residual + i : nullptr; };
  std::int64_t i = 0;
  if (n >= kLanes) {
    for (; i + kLanes <= n; i += kLanes) store(y + i, finish(load(from + i), shifted(i), e));
    i = n - kLanes;
    store(y + i, finish(load(from + i), shifted(i), e));
  } else if (n >= 4) {
    *reinterpret_cast<LooseFour*>(y) = finish_four(from, shifted(0), e);
    for (i = 4; i + 4 <= n; i += 4) *reinterpret_cast<LooseFour*>(y + i) = finish_four(from + i, shifted(i), e);
    i = n - 4;
    *reinterpret_cast<LooseFour*>(y + i) = finish_four(from + i, shifted(i), e);
  } else {
    for (; i < n; ++i) y[i] = clamp(residual ? from[i] + residual[i] : from[i], e);
  }
}

template <class Item, int NT>
void conv_pass(const ConvPlan& plan, const Pass& given) {
  constexpr int kRows = Kind<Item>::kRows;
  const Pass p = given;  // copies, which no write can change
  const Epilogue e = plan.epilogue;
  const Item* items = Kind<Item>::items(plan.nonzeros);
  const bool whole = p.run_count == 1 && p.runs[0].place == 0 && p.runs[0].count == NT * kLanes;
  float places[NT * kLanes];
  for (std::int64_t unit = p.first; unit < p.last; ++unit) {
    Vec acc[kRows * NT];
    float* sums = p.sums + (unit - p.first) * kRows * NT * kLanes;
    if (p.opens) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int t = 0; t < NT; ++t) acc[r * NT + t] = spread(p.bias[unit * kRows + r]);
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < kRows * NT; ++i) acc[i] = load(sums + i * kLanes);
    }
    accumulate<NT>(items + p.start[unit], items + p.start[unit + 1], p.base, acc);
    if (!p.closes) {
#pragma GCC unroll 32
      for (int i = 0; i < kRows * NT; ++i) store(sums + i * kLanes, acc[i]);
      continue;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t channel = (unit * kRows + r) * p.y_stride;
      if (whole) {
        float* y = p.y + channel + p.runs[0].y;
        const float* residual = p.residual ? p.residual + channel + p.runs[0].y : nullptr;
#pragma GCC unroll 16
        for (int t = 0; t < NT; ++t) {
          store(y + t * kLanes, finish(acc[r * NT + t], residual ? residual + t * kLanes : nullptr, plan.epilogue));
        }
        continue;
      }
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) store(places + t * kLanes, acc[r * NT + t]);
      for (std::int64_t i = 0; i < p.run_count; ++i) {
        const Run& run = p.runs[i];
        const std::int64_t at = channel + run.y;
        write(places + run.place, p.residual ? p.residual + at : nullptr, p.y + at, run.count, e);
      }
    }
  }
}

using ConvPass = void (*)(const ConvPlan&, const Pass&);

template <class Item, int NT>
struct ConvPasses {
  static ConvPass find(std::int64_t vectors) {
    return vectors == NT ? &conv_pass<Item, NT> : ConvPasses<Item, NT - 1>::find(vectors);
  }
};
template <class Item>
struct ConvPasses<Item, 1> {
  static ConvPass find(std::int64_t) { return &conv_pass<Item, 1>; }
};

// `n` of every other float; nothing behind the last is read.
inline void copy_even(float* to, const float* from, std::int64_t n) {
  const auto four = [from](std::int64_t i) {
    const Four a = *reinterpret_cast<const LooseFour*>(from + 2 * i), b = *reinterpret_cast<const LooseFour*>(from + 2 * i + 3);
    return Four{a[0], a[2], b[1], b[3]};
  };
  std::int64_t i = 0;
  if (n >= 4) {
    for (; i + 4 <= n; i += 4) *reinterpret_cast<LooseFour*>(to + i) = four(i);
    *reinterpret_cast<LooseFour*>(to + n - 4) = four(n - 4);
  } else {
    for (; i < n; ++i) to[i] = from[2 * i];
  }
}

// Planes of some channels for the tile at (oy, ox), zeros where the image ends; `framed` where those are there already.
void pack_block(const ConvPlan& plan, const float* x, std::int64_t channels, std::int64_t oy, std::int64_t ox, float* to,
                bool framed = false) {
  const ConvShape s = plan.shape;  // copies, as in conv_pass
  const Tiling t = plan.tiling;
  for (std::int64_t c = 0; c < channels; ++c, x += s.height * s.width)
    for (std::int64_t f = 0; f < t.phases; ++f) {
      const std::int64_t y0 = oy * s.stride_h + plan.phase[2 * f] - s.pad_top;
      const std::int64_t x0 = ox * s.stride_w + plan.phase[2 * f + 1] - s.pad_left;
      const auto [begin, end] = find_inside(x0, s.stride_w, t.plane_w, s.width);
      const float* column = x + x0 + begin * s.stride_w;
      for (std::int64_t r = 0; r < t.plane_h; ++r, to += t.plane_w) {
        const std::int64_t iy = y0 + r * s.stride_h, n = end - begin;
        if (iy < 0 || iy >= s.height || n == 0) {
          if (!framed) zero(to, t.plane_w);
          continue;
        }
        const float* from = column + iy * s.width;
        if (s.stride_w == 1) {
          copy(to + begin, from, n);
        } else if (s.stride_w == 2) {
          copy_even(to + begin, from, n);
        } else {
          for (std::int64_t i = 0; i < n; ++i) to[begin + i] = from[s.stride_w * i];
        }
        if (!framed) {
          zero(to, begin);
          zero(to + end, t.plane_w - end);
        }
      }
    }
}

// One plane's outputs at all its places, in passes of `NT` vectors.
template <int NT>
void depthwise_pass(const Single* at, const Single* end, float bias, const float* packed, std::int64_t passes, float* places) {
  for (std::int64_t i = 0; i < passes; ++i, packed += NT * kLanes, places += NT * kLanes) {
    Vec acc[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) acc[t] = spread(bias);
    accumulate<NT>(at, end, reinterpret_cast<const char*>(packed), acc);
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) store(places + t * kLanes, acc[t]);
  }
}

using DepthwisePass = void (*)(const Single*, const Single*, float, const float*, std::int64_t, float*);

template <int NT>
struct DepthwisePasses {
  static DepthwisePass find(std::int64_t vectors) { return vectors == NT ? &depthwise_pass<NT> : DepthwisePasses<NT - 1>::find(vectors); }
};
template <>
struct DepthwisePasses<1> {
  static DepthwisePass find(std::int64_t) { return &depthwise_pass<1>; }
};

// A channel by itself is little work, so nothing is prepared for one of them.  Tiles are whole rows.
void depthwise(const ConvPlan& plan, const float* x, const float* residual, float* y, std::int64_t first, std::int64_t last,
               float* packed) {
  const ConvShape s = plan.shape;  // copies, as in conv_pass
  const Tiling t = plan.tiling;
  const Epilogue e = plan.epilogue;
  const Nonzeros lists = plan.nonzeros;
  const DepthwisePass pass = DepthwisePasses<RELREP_MOST_SINGLE>::find(t.vectors);
  float* places = packed + t.phases * t.plane_h * t.plane_w + kSlack;
  zero(places - kSlack, kSlack);
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t plane = task / t.tiles_y, oy = task % t.tiles_y * t.tile_h, channel = plane % s.groups;
    pack_block(plan, x + plane * s.height * s.width, 1, oy, 0, packed, t.tiles_y == 1 && task > first);
    pass(lists.single + lists.start[channel], lists.single + lists.start[channel + 1], e.bias[channel], packed, t.subtiles, places);
    const std::int64_t rows = least(t.tile_h, s.out_height - oy);
    std::int64_t to = (plane * s.out_height + oy) * s.out_width;
    for (std::int64_t row = 0; row < rows; ++row, to += s.out_width)
      write(places + row * t.plane_w, residual ? residual + to : nullptr, y + to, s.out_width, e);
  }
}

void conv(const ConvPlan& plan, const float* x, const float* residual, float* y, std::int64_t first, std::int64_t last,
          float* scratch) {
  const ConvShape& s = plan.shape;
  const Tiling& t = plan.tiling;
  if (is_depthwise(s)) return depthwise(plan, x, residual, y, first, last, scratch);
  const std::int64_t in_plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const bool quads = plan.nonzeros.quads;
  const ConvPass pass = quads ? ConvPasses<Quad, RELREP_MOST_QUAD>::find(t.vectors)
                              : ConvPasses<Single, RELREP_MOST_SINGLE>::find(t.vectors);
  const std::int64_t places = t.vectors * kLanes;
  float* packed = scratch;
  float* sums = scratch + (t.direct ? 0 : t.block * t.phases * t.plane_h * t.plane_w + kSlack);
  Run runs[kMostLanes * kMostVectors];
  if (!t.direct) zero(sums - kSlack, kSlack);
  for (std::int64_t task = first; task < last; ++task) {
    const auto [part, image, group, oy, ox, rows, cols, span] = find_spot(s, t, task);
    Pass p;
    p.first = plan.units * part / t.parts;
    p.last = plan.units * (part + 1) / t.parts;
    p.bias = plan.epilogue.bias + group * s.rows;
    p.y = y + image * s.rows * out_plane;
    p.residual = residual ? residual + image * s.rows * out_plane : nullptr;
    p.y_stride = out_plane;
    p.runs = runs;
    const std::int64_t sum_rows = (p.last - p.first) * (quads ? 4 : 1);
    for (std::int64_t b = 0; b < t.blocks; ++b) {
      const float* from = x + (image * s.channels + b * t.block) * in_plane;
      if (!t.direct) pack_block(plan, from, least(t.block, s.channels - b * t.block), oy, ox, packed);
      p.start = plan.nonzeros.start + (group * t.blocks + b) * plan.units;
      p.opens = b == 0;
      p.closes = b == t.blocks - 1;
      for (std::int64_t i = 0; i < t.subtiles && i * places < span; ++i) {
        // Where X is read in place the last pass moves back instead of reading past the plane; it repeats some outputs.
        const std::int64_t place = t.direct ? least(i * places, span - places) : i * places;
        p.base = reinterpret_cast<const char*>((t.direct ? from + ox : packed) + place);
        p.sums = sums + i * sum_rows * places;
        p.run_count = find_runs(s, t, oy, ox, rows, cols, place, places, runs);
        pass(plan, p);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ matrix product

void gemm_pack(const GemmPlan& plan, const float* x, float* packed, std::int64_t first, std::int64_t last) {
  const std::int64_t places = plan.vectors * kLanes;
  for (std::int64_t i = first; i < last; ++i) {
    float* to = packed + i * plan.cols * places;
    const std::int64_t row = i * places, rows = least(places, plan.batch - row);
    for (std::int64_t k = 0; k < plan.cols; ++k, to += places) {
      for (std::int64_t r = 0; r < rows; ++r) to[r] = x[(row + r) * plan.cols + k];
      zero(to + rows, places - rows);
    }
  }
}

struct GemmPass {
  const char* packed;         // this subtile
  const std::int32_t* start;  // lists of the first block
  std::int64_t first, last;   // units
  float* sums;
};

template <class Item, int NT>
void gemm_pass(const GemmPlan& plan, const GemmPass& p) {
  constexpr int kRows = Kind<Item>::kRows;
  const Item* items = Kind<Item>::items(plan.nonzeros);
  for (std::int64_t b = 0; b < plan.blocks; ++b) {
    const std::int32_t* start = p.start + b * plan.units;
    const char* base = p.packed + b * plan.block * NT * kLanes * 4;
    for (std::int64_t unit = p.first; unit < p.last; ++unit) {
      Vec acc[kRows * NT];
      float* sums = p.sums + (unit - p.first) * kRows * NT * kLanes;
      if (b == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
          for (int t = 0; t < NT; ++t) acc[r * NT + t] = spread(plan.epilogue.bias[unit * kRows + r]);
      } else {
#pragma GCC unroll 32
        for (int i = 0; i < kRows * NT; ++i) acc[i] = load(sums + i * kLanes);
      }
      accumulate<NT>(items + start[unit], items + start[unit + 1], base, acc);
#pragma GCC unroll 32
      for (int i = 0; i < kRows * NT; ++i) store(sums + i * kLanes, acc[i]);
    }
  }
}

using GemmPassFunction = void (*)(const GemmPlan&, const GemmPass&);

template <class Item, int NT>
struct GemmPasses {
  static GemmPassFunction find(std::int64_t vectors) {
    return vectors == NT ? &gemm_pass<Item, NT> : GemmPasses<Item, NT - 1>::find(vectors);
  }
};
template <class Item>
struct GemmPasses<Item, 1> {
  static GemmPassFunction find(std::int64_t) { return &gemm_pass<Item, 1>; }
};

void gemm(const GemmPlan& plan, const float* packed, const float* residual, float* y, std::int64_t first, std::int64_t last,
          float* scratch) {
  const bool quads = plan.nonzeros.quads;
  const GemmPassFunction pass = quads ? GemmPasses<Quad, RELREP_MOST_QUAD>::find(plan.vectors)
                                      : GemmPasses<Single, RELREP_MOST_SINGLE>::find(plan.vectors);
  const std::int64_t places = plan.vectors * kLanes, parts = (plan.units + plan.part - 1) / plan.part;
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t subtile = task / parts, part = task % parts;
    GemmPass p;
    p.packed = reinterpret_cast<const char*>(packed + subtile * plan.cols * places);
    p.start = plan.nonzeros.start;
    p.first = part * plan.part;
    p.last = least(plan.units, p.first + plan.part);
    p.sums = scratch;
    pass(plan, p);
    const std::int64_t column = p.first * (quads ? 4 : 1), columns = (p.last - p.first) * (quads ? 4 : 1);
    const std::int64_t row = subtile * places, rows = least(places, plan.batch - row);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = (row + r) * plan.rows + column;
      for (std::int64_t c = 0; c < columns; ++c) {
        const float v = scratch[c * places + r];
        y[at + c] = clamp(residual ? v + residual[at + c] : v, plan.epilogue);
      }
    }
  }
}

void gemv(const GemmPlan& plan, const float* x, const float* residual, float* y, std::int64_t first, std::int64_t last) {
  const Epilogue& e = plan.epilogue;
  const char* base = reinterpret_cast<const char*>(x);
  const auto input = [base](std::int32_t offset) { return *reinterpret_cast<const float*>(base + offset); };
  for (std::int64_t unit = first; unit < last; ++unit) {
    const std::int32_t from = plan.nonzeros.start[unit], to = plan.nonzeros.start[unit + 1];
    if (plan.nonzeros.quads) {
      Four acc[4] = {*reinterpret_cast<const LooseFour*>(e.bias + 4 * unit), Four{}, Four{}, Four{}};
      const Quad* at = plan.nonzeros.quad + from;
      const Quad* end = plan.nonzeros.quad + to;
      for (; end - at >= 4; at += 4)
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) acc[s] += *reinterpret_cast<const LooseFour*>(at[s].weight) * input(at[s].offset);
      for (; at < end; ++at) acc[0] += *reinterpret_cast<const LooseFour*>(at->weight) * input(at->offset);
      const Four sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
      for (int r = 0; r < 4; ++r) {
        const float v = sum[r];
        y[4 * unit + r] = clamp(residual ? v + residual[4 * unit + r] : v, e);
      }
    } else {
      float acc[4] = {e.bias[unit], 0.0f, 0.0f, 0.0f};
      const Single* at = plan.nonzeros.single + from;
      const Single* end = plan.nonzeros.single + to;
      for (; end - at >= 4; at += 4)
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) acc[s] += at[s].weight * input(at[s].offset);
      for (; at < end; ++at) acc[0] += at->weight * input(at->offset);
      const float v = (acc[0] + acc[1]) + (acc[2] + acc[3]);
      y[unit] = clamp(residual ? v + residual[unit] : v, e);
    }
  }
}

bool supported() { return RELREP_SUPPORTED; }

}  // namespace

extern const Core RELREP_CORE;
const Core RELREP_CORE = {RELREP_LANES, RELREP_MOST_SINGLE, RELREP_MOST_QUAD, supported, conv, gemm_pack, gemm, gemv};

}  // namespace relrep
