// Where the tasks of a convolution lie, for the inner loops of every element type; compiled once per instruction set like these.
#include "core.h"

namespace relrep {
namespace {

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// One task: a part of the units, on one tile of outputs of one image and group.
struct Spot {
  std::int64_t part, image, group;  // images count groups too
  std::int64_t oy, ox, rows, cols;  // the tile
  std::int64_t span;                // places from its first output to its last, both included
};

inline Spot find_spot(const ConvShape& shape, const Tiling& tiling, std::int64_t task) {
  Spot s;
  s.part = task % tiling.parts;
  const std::int64_t column = task / tiling.parts % tiling.tiles_x, row = task / tiling.parts / tiling.tiles_x % tiling.tiles_y;
  s.image = task / tiling.parts / tiling.tiles_x / tiling.tiles_y;
  s.group = s.image % shape.groups;
  s.oy = row * tiling.tile_h;
  s.ox = column * tiling.tile_w;
  s.rows = least(tiling.tile_h, shape.out_height - s.oy);
  s.cols = least(tiling.tile_w, shape.out_width - s.ox);
  s.span = (s.rows - 1) * tiling.plane_w + s.cols;
  return s;
}

// Outputs that lie together both in the registers' places and in Y.
struct Run {
  std::int64_t place, y, count;
};

// The inputs of a packed row that lie inside the image: [begin, end) of `count`, from column x0 on, `stride` apart.
struct Inside {
  std::int64_t begin, end;
};

inline Inside find_inside(std::int64_t x0, std::int64_t stride, std::int64_t count, std::int64_t width) {
  const std::int64_t begin = least(x0 >= 0 ? 0 : (stride - 1 - x0) / stride, count);
  return {begin, x0 >= width ? begin : most(begin, least(count, (width - 1 - x0) / stride + 1))};
}

// The runs of the places [place, place + count) of a tile that is rows x cols outputs large.
std::int64_t find_runs(const ConvShape& shape, const Tiling& tiling, std::int64_t oy, std::int64_t ox, std::int64_t rows, std::int64_t cols,
                       std::int64_t place, std::int64_t count, Run* runs) {
  const std::int64_t width = tiling.plane_w;
  const std::int64_t end = least(place + count, (rows - 1) * width + cols);
  std::int64_t found = 0, row = place / width, col = place % width;  // divided once: there may be a run per row
  for (std::int64_t at = place; at < end;) {
    if (col < cols) {
      const std::int64_t stop = width == shape.out_width ? end : least(end, at - col + cols);
      runs[found++] = {at - place, (oy + row) * shape.out_width + ox + col, stop - at};
      col += stop - at;
      at = stop;
    } else {
      at += width - col;
      col = 0;
      ++row;
    }
  }
  return found;
}

}  // namespace
}  // namespace relrep
