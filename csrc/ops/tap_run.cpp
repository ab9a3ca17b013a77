// The running half of ops/tap_plan.h: jobs, strips and tiles, in the order in which caches like them.
#include <algorithm>
#include <utility>

#include "base/ahead.h"
#include "base/check.h"
#include "base/div_up.h"
#include "base/scratch.h"
#include "ops/tap_plan.h"

namespace structadmm {
namespace {

using kernels::FiltersArgs;
using kernels::From;
using kernels::GemmCompact;
using kernels::Output;
using kernels::PanelArgs;
using kernels::PanelTile;
using By = TapPlan::By;
using Job = TapPlan::Job;
using Tile = PixelTiles::Tile;

constexpr int64_t kStripFloats = 64 * 1024;  // of x, for which all panels are done before the next strip
// Where each block of a 1x1 layer reads a few channels, little of x is read twice, and its calls are many: where x is
// in caches, so much of it is one strip.
constexpr int64_t kStripOfBlocks = 1024 * 1024;
constexpr int64_t kSharePixels = 192;     // of a thread, below which its tiles would be cut short
constexpr int64_t kSerialMacs = 1 << 20;  // ten microseconds of work: a parallel region costs as much
constexpr int64_t kSpan = kernels::kMaxSpan;
constexpr int64_t kBlockFloats = 6 * 1024;   // of the weights of a job, which tiles of a span read from L1
constexpr int64_t kFarStrips = 4;            // of x, with more of which it does not stay in L2
constexpr int64_t kFarWeights = 256 * 1024;  // floats, likewise
constexpr int64_t kPanelTiles = 12;          // collected at a time, at most; fewer or more made no difference
constexpr int64_t kCollectTaps = 32;         // for all of them, before the next: each may read a page of its own

// Tiles (by the panel kernel: and panels) of one job over `images` images.
int64_t job_units(const TapPlan& plan, const Job& job, int64_t images) {
  if (job.by == By::kFilters) return div_up(images, plan.filters.period) * plan.filters.spans;
  if (job.by == By::kPanel) {
    return div_up(images, plan.panel.period) * static_cast<int64_t>(plan.panel.tiles.size()) * job.panels;
  }
  return div_up(images, plan.direct.period) * plan.direct.whole();
}

// Tiles begin to end of a job's `units`: its share of a strip.
struct Share {
  int64_t begin, end, units;
  bool operator==(const Share&) const = default;
  // Whether x lies beyond L2, and comes in a strip ahead of its use. Where each job has other taps, little of x is read
  // twice.
  bool far(bool blocks = false) const { return units > (blocks ? 2 : kFarStrips) * (end - begin) && end < units; }
};

struct Operands {
  const float *x, *residual;
  float* y;
  int64_t images;
};

// The output of a job whose first filter is `filter`, for images from `image` on.
Output output_of(const TapPlan& plan, const Operands& data, int64_t filter) {
  return {.y = data.y + filter * plan.planes.y.channel_stride,
          .y_stride = plan.planes.y.channel_stride,
          .residual = data.residual ? data.residual + filter * plan.planes.residual.channel_stride : nullptr,
          .residual_stride = plan.planes.residual.channel_stride,
          .stores = nullptr,
          .images = 0,
          .epilogue = plan.epilogue};
}

void to_image(const TapPlan& plan, const Output& first, int64_t image, int64_t images, Output& o) {
  o.y = first.y + image * plan.planes.y.image_stride;
  if (first.residual) o.residual = first.residual + image * plan.planes.residual.image_stride;
  o.images = static_cast<int>(images);
}

// The vectors of a tile that belong to the first `images` images.
struct Some {
  const kernels::PixelVector* vectors;
  int count;
};
Some there(const PixelTiles& t, const Tile& tile, int64_t images) {
  Some some{t.vectors.data() + tile.first, tile.count};
  while (some.count > 0 && some.vectors[some.count - 1].image >= images) --some.count;
  return some;
}

// [NR - 1]
const auto& panel_kernel(const TapPlan& plan, From from) {
  const auto i = static_cast<int>(from);
  const auto& past = plan.kernels->panel_past_caches[i];
  return plan.planes.y.past_caches && past[0] ? past : plan.kernels->panel_kernel[i];
}

PanelTile tile_of(const TapPlan& plan, const Operands& data, const Some& some, int64_t image, int64_t images) {
  return {.x = data.x + image * plan.planes.x.image_stride,
          .vectors = some.vectors,
          .y = image * plan.planes.y.image_stride,
          .residual = image * plan.planes.residual.image_stride,
          .images = static_cast<int>(images)};
}

int64_t most_taps(const Collection& c) {
  int64_t most = 0;
  for (int64_t i = 0; i < c.count(); ++i) most = std::max(most, c.parts[i + 1] - c.parts[i]);
  return most;
}

void run_filters(const TapPlan& plan, const Packed& packed, const Job& job, const Operands& data, const Share& share) {
  const GemmCompact& k = *plan.kernels;
  const auto& t = plan.filters;
  const Panel& panel = packed.panels[job.panel];
  const Panel& last = packed.panels[job.panel + job.panels - 1];
  const int most = filters_tile(plan, packed, job), filters = last.first_filter + last.filters - panel.first_filter;
  const auto& kernel = k.filters_kernel[kernels::width_class(panel.width)][job.panels - 1];
  const Output out = output_of(plan, data, panel.first_filter);
  FiltersArgs a{.x = nullptr,
                .offset = plan.offset.data() + panel.first_tap,
                .n_taps = panel.n_taps,
                .w = packed.weights + panel.weight,
                .panel_stride = panel.n_taps * panel.width,
                .start = packed.bias + panel.first_filter,
                .filters = filters,
                .pixel = nullptr,
                .row = nullptr,
                .sums_stride = panel.width * job.panels,
                .out = out};
  // One span is spread, a panel at a time, between the tiles of the next: written in one go, its lines would fill the
  // store buffer and nothing be left to compute meanwhile.
  constexpr int64_t kSums = kSpan * kernels::kMaxPanel * kernels::kMaxPanels;
  alignas(64) float sums[2 * kSums];
  kernels::SpreadArgs waits{
      .sums = nullptr, .sums_stride = a.sums_stride, .filters = 0, .vectors = 0, .stores = nullptr, .out = out};
  waits.out.stores = t.stores.data();
  int spread = filters;  // filters of it that are done
  // Where each tap reads another channel and weights or x come from afar, they are fetched ahead, and all tiles of a
  // span take so many taps at a time: fewer than the weights that L1 holds. (A 3x3 kernel reads the same x for many
  // taps, and lost 3 to 5 %.)
  const bool pointwise = plan.pointwise();
  const bool far_weights = pointwise && packed.header->weights > kFarWeights;
  const bool in_blocks = far_weights || (pointwise && share.far());
  const int64_t blocks = in_blocks ? std::max<int64_t>(1, div_up(panel.n_taps * a.sums_stride, kBlockFloats)) : 1;
  // Lines of the weights of the next job, where they come from beyond L2.
  const char *stream = reinterpret_cast<const char*>(a.w), *stream_end = stream;
  const int64_t next_panel = job.panel + job.panels;
  if (far_weights && share.end == share.units && next_panel < static_cast<int64_t>(packed.panels.size())) {
    const int64_t first = packed.panels[next_panel].weight;
    stream = reinterpret_cast<const char*>(packed.weights + first);
    stream_end = stream + 4 * std::min(panel.n_taps * a.sums_stride, packed.header->weights - first);
  }
  const auto spread_until = [&](int64_t end) {
    for (; spread < end; spread += panel.width) {
      kernels::SpreadArgs some = waits;
      some.sums += spread;
      some.filters = std::min(panel.width, filters - spread);
      some.out.y += spread * some.out.y_stride;
      if (some.out.residual) some.out.residual += spread * some.out.residual_stride;
      k.spread(some);
    }
  };
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t image = u / t.spans * t.period, images = std::min(t.period, data.images - image);
    const int64_t first = u % t.spans * kSpan, count = std::min(kSpan, images * plan.planes.outputs() - first);
    if (count <= 0) continue;
    a.x = data.x + image * plan.planes.x.image_stride;
    const int64_t tiles = div_up(count, most);
    float* const to = sums + (waits.sums == sums ? kSums : 0);
    const int64_t next = std::min(kSpan, static_cast<int64_t>(t.pixel.size()) - first - kSpan);
    const bool far = pointwise && share.far() && next > 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = block * panel.n_taps / blocks;
      a.offset = plan.offset.data() + panel.first_tap + from;
      a.n_taps = (block + 1) * panel.n_taps / blocks - from;
      a.w = packed.weights + panel.weight + from * panel.width;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = i * count / tiles, n = (i + 1) * count / tiles - at;
        a.pixel = t.pixel.data() + first + at;
        a.ahead = far ? a.pixel[i * next / tiles + kSpan - at] : a.pixel[0];
        a.stream = far || stream < stream_end ? stream : nullptr;
        if (stream < stream_end) stream += a.n_taps * 64;
        a.sums = to + at * a.sums_stride;
        a.start = block == 0 ? packed.bias + panel.first_filter : a.sums;
        a.start_stride = block == 0 ? 0 : a.sums_stride;
        kernel[n - 1](a);
        spread_until(filters * (block * tiles + i + 1) / (blocks * tiles));
      }
    }
    spread_until(filters);
    to_image(plan, out, image, images, waits.out);
    waits.sums = to;
    waits.vectors = static_cast<int>(div_up(count, k.lanes));
    waits.stores = t.vectors.data() + first / k.lanes;
    spread = 0;
  }
  spread_until(filters);
}

// Panels of one width that follow one another, and how far apart their weights are.
struct Neighbours {
  int width, panels = 1;
  int64_t apart = 0;
};

// As a panel kernel does with the one tile of `a`, but pixel by pixel, for the `pixels` first lanes of its vector.
// offset: of the taps from tile.x on; a.filters: of all panels.
void multiply_rest(const TapPlan& plan, const Neighbours& t, int pixels, const int64_t* offset, const PanelArgs& a) {
  static constexpr int32_t kPixel[kernels::kMaxPixels] = {0, 1, 2, 3, 4, 5, 6, 7};
  const GemmCompact& k = *plan.kernels;
  const PanelTile& tile = *a.tiles;
  const int64_t sums_stride = t.width * t.panels;
  float* const sums = tile.sums + a.sums;
  const auto kernel = k.filters_kernel[kernels::width_class(t.width)][t.panels - 1][pixels - 1];
  kernel({.x = tile.x,
          .offset = offset,
          .n_taps = a.n_taps,
          .w = a.w,
          .panel_stride = t.apart,
          .start = a.bias ? a.bias : sums,
          .start_stride = a.bias ? 0 : sums_stride,
          .filters = a.filters,
          .pixel = kPixel,
          .row = nullptr,
          .sums = sums,
          .sums_stride = sums_stride,
          .out = {}});
  if (!a.last) return;
  const kernels::StoreRange stores{tile.vectors->first_store, tile.vectors->stores};
  Output out = a.out;
  out.y += tile.y;
  if (out.residual) out.residual += tile.residual;
  out.images = tile.images;
  k.spread(
      {.sums = sums, .sums_stride = sums_stride, .filters = a.filters, .vectors = 1, .stores = &stores, .out = out});
}

// Tiles on the planes that the kernel takes in one call, and the pixels behind their maps that fill no vector.
struct Together {
  int64_t end;  // the unit behind them
  int count, vectors, rests;
  PanelTile tiles[kPanelTiles], rest[kPanelTiles];
};

// Those of a share, which all jobs have in common: listed once, for there may be hundreds of jobs that take a fraction
// of a microsecond each.
class TilesOfShare {
 public:
  // What a call before this one has left is of other data.
  void forget() { known_ = 0; }

  // The i-th of the share, from `unit` on.
  const Together& at(const TapPlan& plan, const Operands& data, const Share& share, int64_t i, int64_t unit) {
    if (share != share_) share_ = share, known_ = 0;
    if (i < known_) return kept_[i];
    Together& t = kept_[std::min(i, kKept - 1)];
    if (i < kKept - 1) known_ = i + 1;
    fill(plan, data, unit, t);
    return t;
  }

 private:
  void fill(const TapPlan& plan, const Operands& data, int64_t unit, Together& to) const {
    const PixelTiles& t = plan.direct;
    const int64_t tiles = t.whole();
    const bool rest = tiles < static_cast<int64_t>(t.tiles.size());
    to.count = to.vectors = to.rests = 0;
    int64_t in_image = unit % tiles, image = unit / tiles * t.period;
    for (; unit < share_.end; ++unit) {
      const int64_t images = std::min(t.period, data.images - image);
      const Some tile = there(t, t.tiles[in_image], images);
      if (tile.count > 0) {
        if (to.count == kPanelTiles || (to.count > 0 && tile.count != to.vectors)) break;
        to.vectors = tile.count;
        PanelTile& one = to.tiles[to.count++];
        one = tile_of(plan, data, tile, image, images);
        const int64_t later = unit + share_.end - share_.begin;
        if (later < share_.units) {
          one.ahead = (later / tiles * t.period - image) * plan.planes.x.image_stride +
                      t.vectors[t.tiles[later % tiles].first].offset - tile.vectors->offset;
        }
        if (const Some few = rest && in_image + 1 == tiles ? there(t, t.tiles.back(), images) : Some{}; few.count > 0) {
          to.rest[to.rests] = tile_of(plan, data, few, image, images);
          to.rest[to.rests++].x += few.vectors->offset;
        }
      }
      if (++in_image == tiles) in_image = 0, image += t.period;
    }
    to.end = unit;
  }

  static constexpr int64_t kKept = 8;
  Share share_{};
  int64_t known_ = 0;
  Together kept_[kKept];
};
thread_local TilesOfShare tiles_of_share;

// All filters of the panel in one call, over some tiles of as many vectors; and behind them, while the weights are
// near, the pixels of their maps that fill none.
void run_planes(const TapPlan& plan, const Packed& packed, const Job& job, const Operands& data, const Share& share) {
  const Panel& panel = packed.panels[job.panel];
  const auto& kernel = panel_kernel(plan, From::kPlanes);
  const auto args = [&](const Panel& panel) {
    PanelArgs a{.tiles = nullptr,
                .offset = plan.offset.data() + panel.first_tap,
                .n_taps = panel.n_taps,
                .w = packed.weights + panel.weight,
                .w_stride = panel.width,
                .filters = panel.filters,
                .bias = packed.bias + panel.first_filter,
                .out = output_of(plan, data, panel.first_filter)};
    a.out.stores = plan.direct.stores.data();
    return a;
  };
  PanelArgs a = args(panel);
  const float* const behind = a.w + panel.n_taps * panel.width;  // the next panel's weights
  // The first panel of a block fetches what all of it read.
  const bool blocks = packed.panels.front().block != packed.panels.back().block;
  const bool first_of_block = job.panel == 0 || packed.panels[job.panel - 1].block != panel.block;
  a.fetch_planes = plan.pointwise() && share.far(blocks) && first_of_block;
  int64_t unit = share.begin;
  for (int64_t i = 0; unit < share.end; ++i) {
    const Together& t = tiles_of_share.at(plan, data, share, i, unit);
    unit = t.end;
    if (t.count == 0) continue;
    a.tiles = t.tiles;
    a.n_tiles = t.count;
    a.next = unit == share.end ? behind : nullptr;
    kernel[t.vectors - 1](a);
    for (int r = 0; job.rest > 0 && r < t.rests; ++r) {
      alignas(64) float sums[kernels::kMaxLanes * kernels::kMaxPanel * kernels::kMaxPanels];
      PanelTile rest = t.rest[r];
      rest.sums = sums;
      const Panel& first = packed.panels[job.panel - job.rest + 1];
      PanelArgs all = args(first);
      all.tiles = &rest;
      all.filters = panel.first_filter + panel.filters - first.first_filter;
      multiply_rest(plan, {first.width, job.rest, first.n_taps * first.width}, plan.direct.tiles.back().rest,
                    all.offset, all);
    }
  }
}

// Unit u is panel u % job.panels of tile u / job.panels. The taps go in parts: x at those of a part and the pixels of
// some tiles is collected once for all panels, whose sums wait for the next part in memory. Several tiles at a time,
// for all of them read the weights.
void run_panel(const TapPlan& plan, const Packed& packed, const Job& job, const Operands& data, const Share& share) {
  const GemmCompact& k = *plan.kernels;
  const auto& t = plan.panel;
  const Collection& c = plan.collections[job.collection];
  const bool shared = !c.slot.empty(), edges = !t.inside.empty();
  const auto& kernel = panel_kernel(plan, shared ? From::kSlots : From::kCopy);
  const auto tiles = static_cast<int64_t>(t.tiles.size());
  const int64_t tile_floats = k.nr * k.lanes, panel_floats = kernels::kMaxPanel * tile_floats;
  const int64_t copy_floats = most_taps(c) * tile_floats;
  const int64_t most = shared ? 1 : std::clamp<int64_t>((share.end - share.begin) / job.panels, 1, kPanelTiles);
  float* const copies = scratch(most * (copy_floats + job.panels * panel_floats), Scratch::kPanel);
  float* const sums = copies + most * copy_floats;
  // Tiles of as many vectors that are read alike, or one whose pixels are few.
  struct Tiles {
    int64_t begin, end;
    int count, rest;
    kernels::Reads reads;
    bool like(const Tiles& t) const { return count == t.count && reads == t.reads && t.rest == 0; }
  } alike[kPanelTiles];
  PanelTile at[kPanelTiles];
  const float* x[kPanelTiles];  // the first image of each
  // The taps of panel j in a part: from which of its own on, and behind which.
  const auto own = [&](int64_t j, int64_t part) {
    if (!shared) return std::pair{c.parts[part], c.parts[part + 1]};
    const int64_t* const begins = c.begins.data() + j * c.parts.size() + part;
    return std::pair{begins[0], begins[1]};
  };
  const auto first_of = [&](int64_t j) { return shared ? c.begins[j * c.parts.size()] : 0; };
  const auto panel_of = [&](int64_t j) -> const Panel& { return packed.panels[job.panel + j]; };
  const auto weights = [&](int64_t j, int64_t tap) {
    return packed.weights + panel_of(j).weight + (tap - first_of(j)) * panel_of(j).width;
  };
  const Output out = output_of(plan, data, 0);
  PanelArgs a{.tiles = nullptr, .n_taps = 0, .w = nullptr, .w_stride = 0, .filters = 0, .bias = nullptr, .out = out};
  a.out.stores = t.stores.data();
  // What panels `first` to `last` multiply, and where their outputs go.
  const auto of_panels = [&](int64_t first, int64_t last, int64_t part, PanelArgs& a) {
    const Panel &p = panel_of(first), &q = panel_of(last);
    const auto [begin, end] = own(first, part);
    a.slot = shared ? c.slot.data() + begin : nullptr;
    a.n_taps = end - begin;
    a.w = weights(first, begin);
    a.w_stride = p.width;
    a.filters = q.first_filter + q.filters - p.first_filter;
    a.bias = part == 0 ? packed.bias + p.first_filter : nullptr;
    a.sums = first * panel_floats;
    a.out.y = out.y + p.first_filter * out.y_stride;
    if (out.residual) a.out.residual = out.residual + p.first_filter * out.residual_stride;
  };
  for (int64_t unit = share.begin; unit < share.end;) {
    // Whole tiles, or a part of the panels of one.
    const int64_t from = unit % job.panels, left = share.end - unit;
    const int64_t n = from == 0 && left >= job.panels ? std::min<int64_t>(most, left / job.panels) : 1;
    const int64_t to = n > 1 ? job.panels : std::min<int64_t>(job.panels, from + left);
    int64_t groups = 0, fetches = -1;  // fetches: the last group that takes long enough
    for (int64_t i = 0; i < n; ++i) {
      const int64_t u = unit / job.panels + i, image = u / tiles * t.period;
      const int64_t images = std::min(t.period, data.images - image);
      const Tile& tile = t.tiles[u % tiles];
      const Some some = there(t, tile, images);
      at[i] = tile_of(plan, data, some, image, images);
      x[i] = std::exchange(at[i].x, copies + i * copy_floats);
      at[i].sums = sums + i * job.panels * panel_floats;
      const Tiles one{i, i + 1, some.count, tile.rest, tile.reads};
      if (groups > 0 && one.rest == 0 && one.like(alike[groups - 1])) {
        alike[groups - 1].end = i + 1;
      } else if (some.count > 0) {
        alike[groups++] = one;
      }
      if (tile.rest == 0) fetches = groups - 1;
    }
    unit += n > 1 ? n * job.panels : to - from;
    for (int64_t part = 0; part < c.count(); ++part) {
      const auto collect = [&](const Tiles& same, int64_t i, int64_t begin, int64_t end) {
        kernels::CollectArgs from{.x = x[i],
                                  .offset = c.offset.data() + begin,
                                  .n_taps = end - begin,
                                  .vectors = at[i].vectors,
                                  .copy = copies + i * copy_floats + (begin - c.parts[part]) * same.count * k.lanes};
        if (edges) {
          from.edges = {.first = data.x,
                        .end = data.x + plan.planes.x.readable,
                        .position = c.position.data() + begin,
                        .positions = static_cast<int>(plan.position.size()),
                        .inside = t.inside.data() + (from.vectors - t.vectors.data()) * plan.position.size()};
        }
        (edges ? k.collect_edges : k.collect)[static_cast<int>(same.reads)][same.count - 1](from);
      };
      for (int64_t begin = c.parts[part], end; begin < c.parts[part + 1]; begin = end) {
        end = edges || n == 1 ? c.parts[part + 1] : std::min(begin + kCollectTaps, c.parts[part + 1]);
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t i = alike[g].begin; i < alike[g].end; ++i) collect(alike[g], i, begin, end);
        }
      }
      a.last = part == c.count() - 1;
      // All tiles read a panel's weights from L1; of blocks, whose weights are less than the copy they share, all
      // panels read the copy.
      for (int64_t j = from; j < to; ++j) {
        of_panels(j, j, part, a);
        const float* const next =
            j + 1 < to ? weights(j + 1, own(j + 1, part).first) : weights(from, own(from, part).second);
        for (int64_t g = 0; g < groups; ++g) {
          const Tiles& same = alike[g];
          a.tiles = at + same.begin;
          a.n_tiles = static_cast<int>(same.end - same.begin);
          if (same.rest == 0) {
            const bool fetch = g == fetches;
            a.next = fetch ? next : nullptr;
            a.ahead = static_cast<const float*>(fetch_ahead.take(4 * a.filters * a.n_taps * (a.n_tiles - fetch)));
            a.ahead_end = reinterpret_cast<const float*>(fetch_ahead.end);
            kernel[same.count - 1](a);
            continue;
          }
          // They are multiplied for some panels together.
          const auto joins = [&](int64_t i) {
            return !shared && rest_together(k, same.rest) && (i + 1 - from) % kernels::kMaxPanels != 0 && i + 1 < to &&
                   panel_of(i).width == kernels::kMaxPanel && panel_of(i + 1).width == kernels::kMaxPanel;
          };
          if (joins(j)) continue;
          int64_t first = j;
          while (first > from && joins(first - 1)) --first;
          PanelArgs together = a;
          of_panels(first, j, part, together);
          const int64_t apart = j > first ? panel_of(first + 1).weight - panel_of(first).weight : 0;
          multiply_rest(plan, {panel_of(j).width, static_cast<int>(j - first + 1), apart}, same.rest,
                        plan.rest_offset.data() + (shared ? own(j, part).first : 0), together);
        }
      }
    }
  }
}

int64_t tasks_of(int64_t macs, const Parallel& parallel) {
  return macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
}

void run_on_planes(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
                   int64_t images, Parallel& parallel) {
  const Operands data{x, residual, y, images};
  const int64_t macs = packed.header->weights * plan.planes.outputs() * images;
  const int64_t tasks = tasks_of(macs, parallel);
  // All panels over one strip of pixels before the next strip, so that what they read of x stays in L2.
  const int64_t read = images * plan.planes.x.height * plan.planes.x.width * planes_read(plan, packed);
  const int64_t pixels = images * plan.planes.outputs();
  // Threads that divide the pixels, not the filters, find in their own caches what they wrote in the layer before.
  const int64_t shares = tasks > 1 && pixels >= kSharePixels * parallel.threads() ? parallel.threads() : 1;
  const bool blocks = !packed.panels.empty() && packed.panels.front().block != packed.panels.back().block;
  const bool near = blocks && plan.pointwise() && !plan.planes.x.past_caches && read <= kStripOfBlocks;
  const int64_t strip = near ? kStripOfBlocks : kStripFloats;
  const int64_t strips =
      std::clamp<int64_t>(div_up(div_up(read, strip), shares) * shares, 1, std::max<int64_t>(pixels, 1));
  int64_t units = 0;
  for (const Job& job : plan.jobs) units += job_units(plan, job, images);
  parallel.run(tasks, [&](int64_t task) {
    const int64_t first = task * units / tasks, last = (task + 1) * units / tasks;
    int64_t at = 0;  // units before this strip of this job
    tiles_of_share.forget();
    for (int64_t strip = 0; strip < strips && at < last; ++strip) {
      for (const Job& job : plan.jobs) {
        const int64_t n = job_units(plan, job, images);
        // A tile of the panel kernel is collected for all its panels.
        const int64_t whole = job.by == By::kPanel ? job.panels : 1;
        const int64_t low = strip * (n / whole) / strips * whole, high = (strip + 1) * (n / whole) / strips * whole;
        const int64_t begin = low + std::max<int64_t>(0, first - at), end = std::min(high, low + last - at);
        at += high - low;
        if (begin >= end) continue;
        (job.by == By::kFilters ? run_filters
         : job.by == By::kPanel ? run_panel
                                : run_planes)(plan, packed, job, data, {begin, end, n});
      }
    }
#if SADMM_X86
    if (plan.planes.y.past_caches) __builtin_ia32_sfence();  // what went past the caches comes before what follows
#endif
  });
}

}  // namespace

void run_taps(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
              int64_t images, Parallel& parallel) {
  if (!plan.phases) return run_on_planes(plan, packed, x, residual, y, images, parallel);
  const Phases& phases = *plan.phases;
  float* const copy = scratch(plan.planes.x.readable, Scratch::kCopy);
  for (int64_t image = 0; image < images; image += phases.images) {
    const int64_t n = std::min(phases.images, images - image);
    const int64_t tasks = tasks_of(packed.header->weights * plan.planes.outputs() * n, parallel);
    copy_phases(phases, x + image * phases.image_stride, n, copy, tasks, parallel);
    run_on_planes(plan, packed, copy, residual ? residual + image * plan.planes.residual.image_stride : nullptr,
                  y + image * plan.planes.y.image_stride, n, parallel);
  }
}

}  // namespace structadmm
