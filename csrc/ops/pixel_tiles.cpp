#include "ops/pixel_tiles.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <span>

#include "base/check.h"
#include "base/div_up.h"

namespace structadmm {
namespace {

using kernels::PixelStore;

// The outputs of some images in order, and where each reads x (at kernel position 0, channel 0) and writes y.
class Outputs {
 public:
  Outputs(const ConvPlanes& planes, int64_t images)
      : p_(planes),
        row_(p_.geometry.stride[0] * p_.x.pitch),
        base_(p_.x.origin - p_.geometry.padding[0] * p_.x.pitch - p_.geometry.padding[1]),
        images_(images) {}
  bool done() const { return n_ == images_ || p_.outputs() == 0; }
  void next() {
    if (++ox_ < p_.y.width) return;
    ox_ = 0;
    if (++oy_ < p_.y.height) return;
    oy_ = 0;
    ++n_;
  }
  void to(int64_t image, int64_t row, int64_t column) { n_ = image, oy_ = row, ox_ = column; }
  int64_t image() const { return n_; }
  // Whether kernel position (i, j) is inside x.
  bool inside(int64_t i, int64_t j) const {
    const ConvGeometry& g = p_.geometry;
    const int64_t iy = oy_ * g.stride[0] + i * g.dilation[0] - g.padding[0],
                  ix = ox_ * g.stride[1] + j * g.dilation[1] - g.padding[1];
    return 0 <= iy && iy < p_.x.height && 0 <= ix && ix < p_.x.width;
  }
  int64_t x() const { return base_ + n_ * p_.x.image_stride + oy_ * row_ + ox_ * p_.geometry.stride[1]; }
  int64_t y() const { return p_.y.at(n_, 0, oy_, ox_); }
  int64_t residual() const { return p_.residual.at(n_, 0, oy_, ox_); }
  // Whether so many places of y between two outputs are the halo between two rows, not other outputs or somebody
  // else's.
  bool halo_between(int64_t places) const {
    return places == p_.y.pitch - p_.y.width && places == std::max(p_.y.halo.left, p_.y.halo.right);
  }

 private:
  const ConvPlanes& p_;
  int64_t row_, base_, images_;
  int64_t n_ = 0, oy_ = 0, ox_ = 0;
};

// The output `o` is lane `lane` of a vector whose stores begin at `first`: to the last of them, or to another one.
void add_to_stores(const Outputs& o, int lane, int lanes, size_t first, std::vector<PixelStore>& stores) {
  const auto fits = [&](const PixelStore& s) {
    const int64_t at = o.y() - s.y;
    return s.image == o.image() && at >= s.count && at < lanes && (at == s.count || o.halo_between(at - s.count)) &&
           o.residual() - s.residual == at;
  };
  if (stores.size() == first || !fits(stores.back())) {
    stores.push_back({o.y(), o.residual(), 0, static_cast<int32_t>(o.image()), {}, 0, true});
  }
  PixelStore& s = stores.back();
  const int64_t at = o.y() - s.y;
  s.lanes |= 1u << at;
  s.from[at] = static_cast<int8_t>(lane);
  s.straight = s.straight && at == lane;
  s.count = static_cast<int8_t>(at + 1);
}

// Calls lane(output, lane, offset) for every output, and begins(offset) before the first of each vector.
template <class Begins, class Lane>
void for_vectors(Outputs o, const Cut& cut, int lanes, const Begins& begins, const Lane& each) {
  while (!o.done()) {
    const int64_t offset = std::min(o.x(), cut.limit);
    begins(offset);
    int64_t before = -1;
    for (int n = 0; n < lanes && !o.done(); ++n, o.next()) {
      const int64_t at = o.x() - offset;
      if (at < 0 || at >= cut.window * lanes) break;
      // Two outputs may read one place, the first of them at the edge of its row, and the second at that of the next.
      if (cut.window == 1 && at <= before) break;
      before = at;
      each(o, cut.window > 1 ? n : static_cast<int>(at), at);
    }
  }
}

}  // namespace

void check_planes(const char* op, const ConvPlanes& p, int64_t in_channels, int64_t out_channels,
                  const KernelSize& kernel, Dtype dtype) {
  const ConvGeometry& g = p.geometry;
  const int64_t in[] = {p.x.height, p.x.width}, out[] = {p.y.height, p.y.width};
  SADMM_CHECK(p.x.dtype == dtype && p.y.dtype == dtype && p.residual.dtype == dtype, op, ": planes got ",
              dtype_name(p.x.dtype), ", ", dtype_name(p.y.dtype), " and for the residual ",
              dtype_name(p.residual.dtype), ", wanted ", dtype_name(dtype));
  SADMM_CHECK(p.x.channels == in_channels, op, ": x has ", p.x.channels, " channels, wanted ", in_channels);
  SADMM_CHECK(p.y.channels == out_channels, op, ": y has ", p.y.channels, " channels, wanted ", out_channels);
  SADMM_CHECK(p.residual.channels == p.y.channels && p.residual.height == p.y.height && p.residual.width == p.y.width,
              op, ": residual got other sizes than y");
  for (const int axis : {0, 1}) {
    SADMM_CHECK(g.stride[axis] >= 1 && g.dilation[axis] >= 1 && g.padding[axis] >= 0, op,
                ": stride, dilation, padding got ", g.stride[axis], ", ", g.dilation[axis], ", ", g.padding[axis],
                ", wanted at least 1, 1, 0");
    const int64_t reach = in[axis] + 2 * g.padding[axis] - g.dilation[axis] * (kernel[axis] - 1) - 1;
    SADMM_CHECK(reach >= 0 && out[axis] == reach / g.stride[axis] + 1, op, ": y got ", out[axis],
                " pixels on an axis, wanted those of the convolution of ", in[axis]);
  }
  SADMM_CHECK(p.x.pitch >= 0 && p.x.image_stride >= 0 && p.x.channel_stride >= 0, op,
              ": x got negative strides, wanted none");
}

namespace {

// Lanes of the first of two rows that a vector with these stores is all of; 0 where it is not.
int run_of(std::span<const PixelStore> stores, const ConvPlanes& p, int lanes) {
  if (stores.size() != 2 || stores[0].image != stores[1].image) return 0;
  const PixelStore &first = stores[0], &last = stores[1];
  const int64_t gap = last.y + last.count - first.y - lanes;
  if (std::popcount(first.lanes) + std::popcount(last.lanes) != lanes || gap > lanes || gap != p.y.pitch - p.y.width ||
      gap != std::max(p.y.halo.left, p.y.halo.right)) {
    return 0;
  }
  return std::countr_one(first.lanes);
}

// How vectors of a window can be read, by their lanes.
class ReadsOf {
 public:
  ReadsOf(int window, int lanes) : window_(window), lanes_(lanes) {}
  void begin() {
    gap_ = 0;
    ways_.push_back({});
  }
  void add(int lane, int64_t at) {
    Ways& w = ways_.back();
    w.alternate = w.alternate && at == 2 * lane;
    w.fourth = w.fourth && at == 4 * lane;
    // The second run begins where the distance grows, once. (It shrinks where two outputs read one place of a halo.)
    const int64_t gap = at - lane;
    w.two_runs = w.two_runs && (gap == gap_ || gap_ == 0) && gap >= 0 && gap <= lanes_ && (lane > 0 || gap == 0);
    gap_ = gap;
  }
  int64_t gap() const { return gap_; }
  // Of `count` vectors from the `first` on: how all of them can be read, or all but one in eight.
  kernels::Reads all(int64_t first, int64_t count) const { return most(first, count, count); }
  kernels::Reads most() const {
    const auto count = static_cast<int64_t>(ways_.size());
    return most(0, count, count - count / 8);
  }

 private:
  struct Ways {
    bool two_runs = true, alternate = true, fourth = true;
  };
  kernels::Reads most(int64_t first, int64_t count, int64_t least) const {
    using enum kernels::Reads;
    const auto hold = [&](bool Ways::* way) {
      return std::count_if(ways_.begin() + first, ways_.begin() + first + count, std::mem_fn(way)) >= least;
    };
    if (window_ == 1) return kWindow1;
    if (window_ == 4) return hold(&Ways::fourth) ? kFourth : kWindow4;
    return hold(&Ways::two_runs) ? kTwoRuns : hold(&Ways::alternate) ? kAlternate : kWindow2;
  }

  const int64_t window_, lanes_;
  std::vector<Ways> ways_;  // of each vector
  int64_t gap_ = 0;
};

}  // namespace

CutSize size_of(const ConvPlanes& planes, const Cut& cut, int lanes) {
  CutSize size{.most = cut.most};
  ReadsOf reads(cut.window, lanes);
  std::vector<PixelStore> stores;  // of one vector
  int filled = 0;                  // of its lanes, from the first on
  bool in_order = true;
  const auto settle = [&] {
    if (run_of(stores, planes, lanes) > 0) {
      ++size.runs;
    } else {
      for (const PixelStore& s : stores) ++(s.straight && s.count == lanes ? size.whole : size.pieces);
    }
    stores.clear();
  };
  for_vectors(
      Outputs(planes, cut.period), cut, lanes,
      [&](int64_t) {
        settle();
        ++size.vectors;
        filled = 0;
        in_order = true;
        reads.begin();
      },
      [&](const Outputs& o, int lane, int64_t at) {
        in_order = in_order && lane == filled++;
        add_to_stores(o, lane, lanes, 0, stores);
        reads.add(lane, at);
      });
  settle();
  if (in_order && filled < lanes) size.rest = filled;
  size.reads = reads.most();
  return size;
}

bool has_edges(const ConvPlanes& p, const KernelSize& kernel) {
  const ConvGeometry& g = p.geometry;
  const int64_t before[] = {p.x.halo.top, p.x.halo.left}, behind[] = {p.x.halo.bottom, p.x.halo.right};
  const int64_t in[] = {p.x.height, p.x.width}, out[] = {p.y.height, p.y.width};
  for (const int a : {0, 1}) {
    const int64_t over = (out[a] - 1) * g.stride[a] + g.dilation[a] * (kernel[a] - 1) - g.padding[a] - (in[a] - 1);
    if (before[a] < g.padding[a] || behind[a] < over) return true;
  }
  return false;
}

std::vector<uint16_t> inside_of(const ConvPlanes& planes, const KernelSize& kernel, const Cut& cut, int lanes) {
  std::vector<uint16_t> inside;
  const auto positions = static_cast<size_t>(kernel[0] * kernel[1]);
  for_vectors(
      Outputs(planes, cut.period), cut, lanes, [&](int64_t) { inside.resize(inside.size() + positions); },
      [&](const Outputs& o, int lane, int64_t) {
        uint16_t* at = inside.data() + inside.size() - positions;
        for (int64_t i = 0; i < kernel[0]; ++i) {
          for (int64_t j = 0; j < kernel[1]; ++j) *at++ |= static_cast<uint16_t>(o.inside(i, j) << lane);
        }
      });
  return inside;
}

PixelTiles cut_vectors(const ConvPlanes& planes, const Cut& cut, int lanes, bool rest) {
  PixelTiles t;
  int last = 0;  // pixels of the last vector
  t.window = cut.window;
  t.period = cut.period;
  ReadsOf reads(cut.window, lanes);
  for_vectors(
      Outputs(planes, t.period), cut, lanes,
      [&](int64_t offset) {
        t.vectors.push_back({offset, static_cast<int32_t>(t.stores.size()), 0, {}});
        last = 0;
        reads.begin();
      },
      [&](const Outputs& o, int lane, int64_t at) {
        kernels::PixelVector& v = t.vectors.back();
        v.lane[lane] = static_cast<int8_t>(at);
        reads.add(lane, at);
        ++last;
        // Lanes that hold no output go on as a run would.
        for (int i = lane + 1; i < std::min(lanes, kernels::kMaxLanes); ++i) {
          v.lane[i] = static_cast<int8_t>(std::min<int64_t>(i + reads.gap(), cut.window * lanes - 1));
        }
        add_to_stores(o, lane, lanes, static_cast<size_t>(v.first_store), t.stores);
        v.stores = static_cast<int32_t>(t.stores.size()) - v.first_store;
      });
  for (kernels::PixelVector& v : t.vectors) {
    const kernels::PixelStore& s = t.stores[v.first_store];
    v.y = s.y, v.residual = s.residual, v.lanes = s.lanes, v.image = s.image;
    v.straight = v.stores == 1 && s.straight ? s.count : 0;
    v.run = run_of(std::span(&s, v.stores), planes, lanes);
    v.gap = static_cast<int32_t>(planes.y.pitch - planes.y.width);
    v.residual_gap = static_cast<int32_t>(planes.residual.pitch - planes.residual.width);
  }
  const int64_t count = static_cast<int64_t>(t.vectors.size()) - (rest ? 1 : 0);
  const int64_t tiles = div_up(count, int64_t{cut.most});
  // Those of as many vectors one behind the other, for a kernel takes them together.
  for (int64_t i = 0, begin = 0; i < tiles; ++i) {
    const int64_t n = count / tiles + (i < count % tiles ? 1 : 0);
    t.tiles.push_back({begin, static_cast<int>(n), reads.all(begin, n)});
    begin += n;
  }
  if (rest) t.tiles.push_back({count, 1, reads.all(count, 1), last});
  return t;
}

SquareTiles cut_squares(const ConvPlanes& planes, int64_t period, int64_t most, int pixel_lanes, int run_lanes) {
  constexpr int kSide = 4;
  const int64_t height = planes.y.height, width = planes.y.width;
  const int64_t high = div_up(height, int64_t{kSide}), wide = div_up(width, int64_t{kSide});
  const int64_t per_group = pixel_lanes / kSide;
  // Whole rows of tiles, or even parts of one, so that runs and groups are long.
  const int64_t rows = period * high, parts = div_up(wide, most);
  const int64_t blocks = parts > 1 ? rows * parts : div_up(rows, most / std::max<int64_t>(wide, 1));
  const auto begin_of = [&](int64_t b) {
    return parts > 1 ? b / parts * wide + b % parts * wide / parts : b * rows / blocks * wide;
  };
  const auto row_of = [&](int64_t tile) { return tile / wide % high * kSide; };
  const auto column_of = [&](int64_t tile) { return tile % wide * kSide; };
  SquareTiles t;
  t.period = period;
  Outputs o(planes, period);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = begin_of(b), end = begin_of(b + 1);
    SquareTiles::Block block{.first_run = static_cast<int64_t>(t.runs.size()),
                             .runs = 0,
                             .first_group = static_cast<int64_t>(t.groups.size()),
                             .groups = 0,
                             .tiles = static_cast<int>(end - begin)};
    for (int64_t tile = begin; tile < end; ++block.runs) {
      const int64_t n = std::min({wide - tile % wide, end - tile, int64_t{run_lanes}});
      t.runs.push_back(
          {tile / wide / high, row_of(tile), column_of(tile), static_cast<int>(tile - begin), static_cast<int>(n)});
      tile += n;
    }
    for (int64_t tile = begin; tile < end; ++block.groups) {
      // Where a row has tiles enough, none of the next: its pixels would be stored in pieces.
      const int64_t in_row = wide < per_group ? per_group : wide - tile % wide,
                    n = std::min({per_group, end - tile, in_row});
      SquareTiles::Group group{static_cast<int>(tile - begin), static_cast<int>(n), {}};
      for (int r = 0; r < kSide; ++r) {
        const size_t first = t.stores.size();
        for (int64_t i = 0; i < n * kSide; ++i) {
          const int64_t at = tile + i / kSide, row = row_of(at) + r, column = column_of(at) + i % kSide;
          if (row >= height || column >= width) continue;
          o.to(at / wide / high, row, column);
          add_to_stores(o, static_cast<int>(i), pixel_lanes, first, t.stores);
        }
        group.rows[r] = {static_cast<int64_t>(first), static_cast<int>(t.stores.size() - first)};
      }
      t.groups.push_back(group);
      tile += n;
    }
    t.blocks.push_back(block);
  }
  return t;
}

FilterTiles cut_pixels(const ConvPlanes& planes, int64_t period, int lanes) {
  FilterTiles t;
  t.period = period;
  t.spans = div_up(period * planes.outputs(), int64_t{kernels::kMaxSpan});
  int lane = 0;
  for (Outputs o(planes, period); !o.done(); o.next(), lane = (lane + 1) % lanes) {
    if (lane == 0) t.vectors.push_back({static_cast<int64_t>(t.stores.size()), 0});
    kernels::StoreRange& vector = t.vectors.back();
    t.pixel.push_back(static_cast<int32_t>(o.x()));
    add_to_stores(o, lane, lanes, static_cast<size_t>(vector.first), t.stores);
    vector.count = static_cast<int>(static_cast<int64_t>(t.stores.size()) - vector.first);
  }
  return t;
}

}  // namespace structadmm
