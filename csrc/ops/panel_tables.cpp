#include "ops/panel_tables.h"

#include <algorithm>
#include <utility>

#include "base/div_up.h"

namespace structadmm {
namespace {

using kernels::Gather;
using kernels::kTile;
using kernels::PanelPair;
using kernels::PanelVector;
using kernels::PlaneWindow;
using kernels::Read;

constexpr int kPairPixels = 2 * kTile, kWindow = 32;

struct Pixel {
  int64_t x, y, residual;
  int32_t image;
};

// Cuts pixels into pieces that lie within `width` elements of x, at most a tile: how many are covered. Positions go
// back where a row's halo on the right is the next one's on the left.
int covered(const Pixel* p, int64_t left, int pieces, int64_t width, int (&ends)[4]) {
  const int most = static_cast<int>(std::min<int64_t>(left, kTile));
  int n = 0;
  for (int i = 0; i < pieces; ++i) {
    const int first = n;
    while (n < most && p[n].x >= p[first].x && p[n].x - p[first].x < width) ++n;
    ends[i] = n;
  }
  return n;
}

// The vector of the next pixels; returns how many it takes. readable: elements of x that a tap at offset 0 may load.
int next_vector(const Pixel* p, int64_t left, int64_t readable, PanelVector& v) {
  const int whole = static_cast<int>(std::min<int64_t>(left, kTile));
  struct Way {
    Gather gather;
    int pieces, width;
  };
  int best = 0, ends[4] = {};
  Way way{Gather::kLanes, 0, 0};
  for (const Way& w : {Way{Gather::kWindow, 1, 32}, Way{Gather::kHalves, 2, 16}, Way{Gather::kQuarters, 4, 8},
                       Way{Gather::kTwoWindows, 2, 32}}) {
    int e[4];
    const int n = covered(p, left, w.pieces, w.width, e);
    if (n <= best || readable < w.width) continue;
    best = n;
    way = w;
    std::copy_n(e, 4, ends);
  }
  // Half empty vectors cost tile products; single loads cost only a panel.
  if (best * 2 < whole) {
    best = whole;
    way = {Gather::kLanes, 0, 0};
  }
  v = {};
  v.gather = way.gather;
  for (int i = 0; i < kTile; ++i) v.lane[i] = static_cast<int32_t>(p[i < best ? i : 0].x);
  int row = 1;
  while (row < best && p[row].x == p[0].x + row) ++row;
  if (row == kTile) {
    v.gather = Gather::kRow;
    v.piece[0] = v.lane[0];
    for (int16_t i = 0; i < kTile; ++i) {
      v.index[2 * i] = i;
      v.index[2 * i + 1] = static_cast<int16_t>(i + kTile);
    }
    return best;
  }
  for (int i = 0, n = 0; i < way.pieces; ++i) {
    // Shifted down where the last planes leave no room behind the pixels.
    const int64_t last = readable - way.width;
    v.piece[i] = static_cast<int32_t>(std::min(n < best ? p[n].x : p[0].x, last));
    for (; n < ends[i]; ++n) v.index[2 * n] = static_cast<int16_t>(i * way.width + p[n].x - v.piece[i]);
  }
  for (int i = 0; i < kTile; ++i) {
    v.index[2 * i] = v.index[2 * (i < best ? i : 0)];
    v.index[2 * i + 1] = static_cast<int16_t>(v.index[2 * i] + (way.gather == Gather::kTwoWindows ? 0 : kWindow));
  }
  return best;
}

// Windows over the pixels of a pair, n of them; lane[i] is where pixel i stands in the pair.
void cut_windows(const Pixel* p, const int* lane, int n, int64_t Pixel::* place, std::vector<PlaneWindow>& windows) {
  for (int i = 0; i < n;) {
    PlaneWindow w{};
    w.offset = p[i].*place;
    w.image = p[i].image;
    for (; i < n && p[i].image == w.image && p[i].*place - w.offset < kWindow; ++i) {
      const int64_t element = p[i].*place - w.offset;
      w.elements |= 1u << element;
      w.filled |= 1u << element;
      w.pixels |= 1u << lane[i];
      w.to[element] = static_cast<int16_t>(lane[i]);
      w.from[lane[i]] = static_cast<int16_t>(element);
    }
    windows.push_back(w);
  }
}

int lane_of(int pixel, const PanelPair& pair) {
  return pair.read != Read::kVectors && pair.vectors == 2 ? kernels::row_order(pixel) : pixel;
}

PanelPair next_pair(const PanelTables& t) {
  PanelPair pair{};
  pair.first_vector = static_cast<int32_t>(t.vectors.size());
  pair.first_window = static_cast<int32_t>(t.windows.size());
  pair.first_residual = static_cast<int32_t>(t.residual_windows.size());
  return pair;
}

// The pair of the vectors and windows that were added since it began.
void add_pair(PanelPair pair, int32_t image, PanelTables& t) {
  pair.windows = static_cast<int32_t>(t.windows.size()) - pair.first_window;
  pair.residuals = static_cast<int32_t>(t.residual_windows.size()) - pair.first_residual;
  t.pairs.push_back(pair);
  t.first_image.push_back(image);
}

// Which of the caller's pixels the taps find, `taken` outputs from the `first` on; and how they can be read.
Read find_edges(const ConvSpec& s, const PanelPlanes& l, int64_t x0, int64_t first, int taken, int vectors,
                PanelTables& t) {
  const uint32_t all = taken == kPairPixels ? 0xFFFFFFFF : (1u << taken) - 1;
  bool edges = false;
  for (int64_t ky = 0; ky < s.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < s.kernel[1]; ++kx) {
      uint32_t inside = 0;
      for (int j = 0; j < taken; ++j) {
        const int64_t y = (first + j) / l.x.width + ky * s.dilation[0] - s.padding[0];
        const int64_t x = (first + j) % l.x.width + kx * s.dilation[1] - s.padding[1];
        if (y >= 0 && y < l.x.height && x >= 0 && x < l.x.width) inside |= 1u << j;
      }
      edges = edges || inside != all;
      t.inside.push_back(inside);
    }
  }
  if (x0 + first + l.nearest < 0 || x0 + first + vectors * kTile > l.readable(1)) return Read::kEnds;
  return edges ? Read::kEdges : Read::kRow;
}

// Rows of x with their halo are taken for pixels, 32 at a time: x is read in whole vectors. Where the planes of y lie
// alike and have room for zeros between their rows, so are they written, and no store crosses lines of memory. Sets
// nothing and returns false where rows can't be read so, or where the halo is too much of them.
bool make_row_tables(const ConvSpec& s, const PanelPlanes& l, PanelTables& t) {
  const Planes &x = l.x, &y = l.y;
  const bool caller = x.dtype == Dtype::kF32;
  // Padding can make rows of outputs that are longer than those of x and overlap in it.
  if (s.stride[0] != 1 || s.stride[1] != 1 || x.pitch < y.width) return false;
  const int64_t between = y.pitch - y.width, count = (y.height - 1) * x.pitch + y.width;
  const bool alike = x.pitch == y.pitch && (!l.residual || l.residual->pitch == y.pitch) && !caller && between >= 0 &&
                     between <= std::max(y.halo.left, y.halo.right) && y.dtype == Dtype::kBf16;
  PanelTables made;
  // Images lie alike in lines.
  while (alike &&
         (l.images % made.period != 0 || (made.period < l.images && made.period * y.image_stride % kWindow != 0))) {
    ++made.period;
  }
  for (int64_t n = 0; n < made.period; ++n) {
    const int64_t x0 = x.at(n, 0, -s.padding[0], -s.padding[1]), y0 = y.at(n, 0, 0, 0);
    for (int64_t i = 0; i < count;) {
      const int64_t line = alike ? kWindow - (y0 + i) % kWindow : kWindow;
      const auto taken = static_cast<int>(std::min(line, count - i));
      PanelPair pair = next_pair(made);
      pair.vectors = static_cast<int32_t>(div_up(taken, kTile));
      pair.read = caller ? find_edges(s, l, x0, i, taken, pair.vectors, made) : l.rows ? Read::kRow : Read::kVectors;
      for (int k = 0; k < pair.vectors; ++k) {
        PanelVector v{};
        v.gather = Gather::kRow;
        for (int16_t j = 0; j < kTile; ++j) {
          v.lane[j] = static_cast<int32_t>(x0 + i + k * kTile + j);
          v.index[2 * j] = j;
          v.index[2 * j + 1] = static_cast<int16_t>(j + kTile);
        }
        v.piece[0] = v.lane[0];
        if (!caller && v.lane[kTile - 1] >= l.readable(made.period)) return false;
        made.vectors.push_back(v);
      }
      Pixel pixels[kPairPixels];
      int lane[kPairPixels], found = 0;
      for (int j = 0; j < taken; ++j) {
        const int64_t oy = (i + j) / x.pitch, ox = (i + j) % x.pitch;
        if (ox >= y.width) continue;
        lane[found] = lane_of(j, pair);
        pixels[found++] = {0, y.at(n, 0, oy, ox), l.residual ? l.residual->at(n, 0, oy, ox) : 0,
                           static_cast<int32_t>(n)};
      }
      if (alike) {
        PlaneWindow w{};
        w.offset = y0 + i;
        w.image = static_cast<int32_t>(n);
        for (int j = 0; j < taken; ++j) {
          const int to = lane_of(j, pair);
          w.to[j] = static_cast<int16_t>(to);
          w.from[to] = static_cast<int16_t>(j);
          w.elements |= 1u << j;
          if ((i + j) % y.pitch >= y.width) continue;
          w.filled |= 1u << j;
          w.pixels |= 1u << to;
        }
        made.windows.push_back(w);
        if (l.residual) {
          w.offset = l.residual->at(n, 0, 0, 0) + i;
          made.residual_windows.push_back(w);
        }
      } else if (found > 0) {  // a pair may lie in the halo alone, but for an image's last: windows follow
        cut_windows(pixels, lane, found, &Pixel::y, made.windows);
        if (l.residual) cut_windows(pixels, lane, found, &Pixel::residual, made.residual_windows);
      }
      add_pair(pair, static_cast<int32_t>(n), made);
      i += taken;
    }
  }
  constexpr int64_t kMost = 5, kOf = 4;  // vectors
  if (!caller &&
      static_cast<int64_t>(made.vectors.size()) * kOf > div_up(made.period * y.height * y.width, kTile) * kMost) {
    return false;
  }
  t = std::move(made);
  return true;
}

}  // namespace

PanelTables make_panel_tables(const ConvSpec& s, const PanelPlanes& l) {
  PanelTables t;
  if (make_row_tables(s, l, t)) return t;
  const Planes &x = l.x, &y = l.y;
  // Images are cut together until whole pairs are nearly filled, for tables are read along with x; a divisor of all
  // images, so that no pair reads an image that has no place.
  const int64_t outputs = y.height * y.width;
  for (t.period = 1; t.period < l.images; ++t.period) {
    const int64_t all = t.period * outputs;
    if (l.images % t.period == 0 && div_up(all, kPairPixels) * kPairPixels - all <= all / 32) break;
  }
  std::vector<Pixel> pixels;
  for (int64_t n = 0; n < t.period; ++n) {
    for (int64_t oy = 0; oy < y.height; ++oy) {
      for (int64_t ox = 0; ox < y.width; ++ox) {
        pixels.push_back({x.at(n, 0, oy * s.stride[0] - s.padding[0], ox * s.stride[1] - s.padding[1]),
                          y.at(n, 0, oy, ox), l.residual ? l.residual->at(n, 0, oy, ox) : 0, static_cast<int32_t>(n)});
      }
    }
  }
  const auto count = static_cast<int64_t>(pixels.size());
  for (int64_t i = 0; i < count;) {
    const Pixel* p = pixels.data() + i;
    PanelPair pair = next_pair(t);
    int lane[kPairPixels], n = 0;
    while (pair.vectors < 2 && i < count) {
      PanelVector v;
      const int taken = next_vector(pixels.data() + i, count - i, l.readable(t.period), v);
      for (int k = 0; k < taken; ++k) lane[n++] = pair.vectors * kTile + k;
      t.vectors.push_back(v);
      ++pair.vectors;
      i += taken;
    }
    const auto is_row = [&](int k) { return t.vectors[pair.first_vector + k].gather == Gather::kRow; };
    const auto piece = [&](int k) { return t.vectors[pair.first_vector + k].piece[0]; };
    if (l.rows && pair.vectors == 2 && is_row(0) && is_row(1) && piece(1) == piece(0) + kTile) {
      pair.read = Read::kRow;
      for (int k = 0; k < n; ++k) lane[k] = lane_of(lane[k], pair);
    }
    cut_windows(p, lane, n, &Pixel::y, t.windows);
    if (l.residual) cut_windows(p, lane, n, &Pixel::residual, t.residual_windows);
    add_pair(pair, p->image, t);
  }
  return t;
}

}  // namespace structadmm
