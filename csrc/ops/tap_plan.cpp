#include "ops/tap_plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <span>
#include <utility>

#include "base/check.h"
#include "base/div_up.h"

namespace structadmm {
namespace {

using kernels::GemmCompact;
using By = TapPlan::By;
using Job = TapPlan::Job;
using Tile = PixelTiles::Tile;

constexpr int64_t kMaxPeriod = 16;     // images in one table of tiles
constexpr int64_t kPanelTaps = 144;    // in a copy of x: it and a panel of weights stay in L1
constexpr int64_t kSharedTaps = 1536;  // in one for several blocks, of which each panel has few

// Cycles of a job of `taps` taps. What a tile costs besides its taps (its first sums, its stores) was measured in
// AVX-512.
double filters_cost(const GemmCompact& k, int width_class, int panels, int64_t pixels, double taps) {
  const int most = k.pixels[width_class][panels - 1];
  const int64_t tiles = div_up(pixels, most);
  const double each = static_cast<double>(pixels) / static_cast<double>(tiles * most);
  const double tap = k.filters_cycles[width_class][panels - 1] * std::max(0.4, each);
  constexpr double kSpread = 280;  // of a vector of pixels and a panel
  return static_cast<double>(tiles) * (tap * taps + 30) +
         kSpread * panels * static_cast<double>(div_up(pixels, k.lanes));
}

double pixels_cost(const GemmCompact& k, int width, int64_t vectors, int window, double taps) {
  const int c = kernels::width_class(width);
  const int64_t tiles = div_up(vectors, k.nr[c]), least = vectors / tiles, more = vectors % tiles;
  const double cycles = static_cast<double>(tiles - more) * k.pixels_cycles[c][least - 1] +
                        (more == 0 ? 0.0 : static_cast<double>(more) * k.pixels_cycles[c][least]);
  constexpr double kGather = 1.5;  // a second load and a permutation per vector
  return (cycles * (window > 1 ? kGather : 1.0) * taps + 35.0 * static_cast<double>(vectors)) * (width / k.mr[c]);
}

double stores_cost(int64_t filters, const CutSize& size) {
  constexpr double kWhole = 2, kPiece = 8;  // cycles of a store
  return static_cast<double>(filters) *
         (kWhole * static_cast<double>(size.whole) + kPiece * static_cast<double>(size.pieces));
}

// Of a job by the panel kernel, for some filters that share their taps.
double panel_cost(const GemmCompact& k, int64_t filters, const CutSize& size, double taps) {
  const int nr = k.nr[0];
  const int64_t tiles = div_up(size.vectors, nr), least = size.vectors / tiles, more = size.vectors % tiles;
  const auto tile = [&](int64_t vectors) {
    return taps * (k.panel_cycles[vectors - 1] * static_cast<double>(div_up(filters, 4)) +
                   k.collect_cycles[static_cast<int>(size.reads)] * static_cast<double>(vectors));
  };
  return static_cast<double>(tiles - more) * tile(least) +
         (more == 0 ? 0.0 : static_cast<double>(more) * tile(least + 1)) + stores_cost(filters, size);
}

// Of several blocks by the panel kernel from one copy of `taps` taps, of which their panels have `all` in sum; panels
// are `width` wide.
double shared_cost(const GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps) {
  constexpr double kCall = 25, kSum = 1.5;  // cycles of a call, and of a vector of sums that waits for the next part
  const int64_t tiles = div_up(size.vectors, k.nr[0]), least = size.vectors / tiles, more = size.vectors % tiles;
  const auto parts = static_cast<double>(div_up(taps, kSharedTaps));
  const auto tile = [&](int64_t vectors) {
    double cycles = static_cast<double>(taps * vectors) * k.collect_cycles[static_cast<int>(size.reads)];
    for (const Panel& p : packed.panels) {
      cycles += static_cast<double>(p.n_taps * (p.width / 4)) * k.panel_cycles[vectors - 1] +
                parts * (kCall + kSum * static_cast<double>(p.width * vectors));
    }
    return cycles;
  };
  return static_cast<double>(tiles - more) * tile(least) +
         (more == 0 ? 0.0 : static_cast<double>(more) * tile(least + 1)) +
         stores_cost(packed.header->out_channels, size);
}

// The taps of the first panel, or of all of them; `most` in a part.
Collection collect_taps(const Packed& packed, std::span<const Panel> panels, int64_t most, const auto& offset_of) {
  std::vector<kernels::Tap> taps;
  const auto order = [](const kernels::Tap& t) { return std::pair{t.channel, t.position}; };
  const auto before = [&](const kernels::Tap& a, const kernels::Tap& b) { return order(a) < order(b); };
  const auto same = [&](const kernels::Tap& a, const kernels::Tap& b) { return order(a) == order(b); };
  for (const Panel& p : panels) {
    if (&p != &panels[0] && p.block == (&p)[-1].block) continue;
    taps.insert(taps.end(), packed.taps + p.first_tap, packed.taps + p.first_tap + p.n_taps);
  }
  std::sort(taps.begin(), taps.end(), before);
  taps.erase(std::unique(taps.begin(), taps.end(), same), taps.end());
  Collection c;
  for (const kernels::Tap& t : taps) {
    c.offset.push_back(offset_of(t));
    c.position.push_back(static_cast<uint8_t>(t.position));
  }
  const auto count = static_cast<int64_t>(taps.size()), parts = std::max<int64_t>(1, div_up(count, most));
  for (int64_t i = 0; i <= parts; ++i) c.parts.push_back(i * count / parts);
  if (panels.front().block == panels.back().block) return c;
  for (const Panel& p : panels) {
    int64_t part = 0, at = 0;  // of the part, of the tap in all
    for (const kernels::Tap *t = packed.taps + p.first_tap, *const end = t + p.n_taps; t != end; ++t) {
      at = std::lower_bound(taps.begin() + at, taps.end(), *t, before) - taps.begin();
      for (; part < parts && c.parts[part] <= at; ++part) c.begins.push_back(static_cast<int64_t>(c.slot.size()));
      c.slot.push_back(static_cast<uint16_t>(at - c.parts[part - 1]));
    }
    for (; part <= parts; ++part) c.begins.push_back(static_cast<int64_t>(c.slot.size()));
  }
  return c;
}

// How many images to cut together so that little of the last tile is wasted, as far as `most`; 1 where an image is many
// tiles.
template <class Cost>
int64_t choose_period(int64_t most, int64_t outputs, const Cost& cost) {
  int64_t period = 1;
  double best = cost(1);
  for (int64_t n = 2; n <= std::min(most, kMaxPeriod) && (n - 1) * outputs < 256; ++n) {
    const double each = cost(n) / static_cast<double>(n);
    if (each < 0.97 * best) best = each, period = n;
  }
  return period;
}

void check_planes(const char* op, const Packed& packed, const ConvPlanes& p, const GemmCompact& k) {
  const ConvGeometry& g = p.geometry;
  const kernels::PackedHeader& h = *packed.header;
  const int64_t kernel[] = {h.kernel_h, h.kernel_w}, in[] = {p.x.height, p.x.width}, out[] = {p.y.height, p.y.width};
  SADMM_CHECK(p.x.dtype == Dtype::kF32 && p.y.dtype == Dtype::kF32 && p.residual.dtype == Dtype::kF32, op,
              ": planes got ", dtype_name(p.x.dtype), " and ", dtype_name(p.y.dtype), ", wanted f32");
  SADMM_CHECK(p.x.channels == h.in_channels, op, ": x has ", p.x.channels, " channels, wanted ", h.in_channels);
  SADMM_CHECK(p.y.channels == h.out_channels, op, ": y has ", p.y.channels, " channels, wanted ", h.out_channels);
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
  if (has_edges(p, {h.kernel_h, h.kernel_w})) {
    SADMM_CHECK(k.panel_cycles[0] > 0 && h.kernel_h * h.kernel_w <= kernels::kMaxEdgePositions, op,
                ": x got a halo of ", p.x.halo.top, " and ", p.x.halo.left, " before it, ", p.x.halo.bottom, " and ",
                p.x.halo.right, " behind, wanted what the kernel reaches");
  }
  SADMM_CHECK(p.x.pitch >= 0 && p.x.image_stride >= 0 && p.x.channel_stride >= 0, op,
              ": x got negative strides, wanted none");
}

}  // namespace

bool takes_edges(const Packed& packed, Isa isa) {
  // A vector of a padded copy costs what two masks do. (Measured in AVX2; with several images the copy is faster, for
  // in it those of a channel are neighbours.)
  constexpr int64_t kTaps = 2, kFilters = 32;
  const kernels::PackedHeader& h = *packed.header;
  const int64_t positions = h.kernel_h * h.kernel_w;
  if (kernels::gemm_compact(isa).panel_cycles[0] == 0 || positions > kernels::kMaxEdgePositions) return false;
  if (packed.panels.empty() || h.out_channels < kFilters * (packed.panels.back().block + 1)) return false;
  std::vector<char> read(static_cast<size_t>(h.in_channels * positions));
  for (int64_t t = 0; t < h.taps; ++t) read[packed.taps[t].channel * positions + packed.taps[t].position] = 1;
  return std::count(read.begin(), read.end(), 1) <= kTaps * h.channels;
}

TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& g, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa) {
  const kernels::PackedHeader& h = *packed.header;
  TapPlan plan{.kernels = &kernels::gemm_compact(isa),
               .planes = {x, y, residual ? *residual : y, g},
               .epilogue = epilogue,
               .position = {},
               .offset = {},
               .collections = {},
               .jobs = {},
               .pixels = {},
               .panel = {},
               .filters = {}};
  const GemmCompact& k = *plan.kernels;
  check_planes(op, packed, plan.planes, k);
  const int64_t kernel[] = {h.kernel_h, h.kernel_w};
  const bool edges = has_edges(plan.planes, kernel);
  images = std::max<int64_t>(images, 1);
  for (int64_t i = 0; i < h.kernel_h; ++i) {
    for (int64_t j = 0; j < h.kernel_w; ++j) {
      plan.position.push_back(i * g.dilation[0] * x.pitch + j * g.dilation[1]);
    }
  }

  const auto offset_of = [&](const kernels::Tap& t) {
    return t.channel * x.channel_stride + plan.position[t.position];
  };

  // Where a window of slack lies behind the last place that is read, vectors may begin anywhere; otherwise those of the
  // last image must not, and the tables of all images are as that of the last.
  const int64_t outputs = plan.planes.outputs();
  const int64_t farthest = plan.position.back() + (h.in_channels - 1) * x.channel_stride;
  const int64_t last = x.origin + (images - 1) * x.image_stride +
                       ((y.height - 1) * g.stride[0] - g.padding[0]) * x.pitch + (y.width - 1) * g.stride[1] -
                       g.padding[1];
  SADMM_CHECK(edges || last + farthest < x.readable, op, ": x got ", x.readable, " readable elements, wanted ",
              last + farthest + 1);
  const auto cut_of = [&](int window, int64_t period) -> Cut {
    const bool slack = edges || last + farthest + window * k.lanes <= x.readable;
    const int64_t limit = slack ? std::numeric_limits<int64_t>::max()
                                : x.readable - farthest - window * k.lanes - (images - 1) * x.image_stride;
    return {window, period, limit};
  };
  // The cheapest of these windows by cost(size of a cut, window), and how many images to cut together. window = 0:
  // none.
  struct Choice {
    Cut cut{0, 1, 0};
    CutSize size;
    double cost = 0;  // of an image
  };
  const auto choose = [&](std::initializer_list<int> windows, const auto& cost) {
    Choice best;
    for (const int window : windows) {
      if (window == 1 && g.stride[1] != 1) continue;
      const Cut one = cut_of(window, 1);
      if (one.limit < 0) continue;
      const bool slack = one.limit == std::numeric_limits<int64_t>::max();
      const auto cost_of = [&](int64_t n) { return cost(size_of(plan.planes, cut_of(window, n), k.lanes), window); };
      const int64_t period = choose_period(slack ? images : 1, outputs, cost_of);
      const double each = cost_of(period) / static_cast<double>(period);
      if (best.cut.window != 0 && each >= best.cost) continue;
      const Cut cut = cut_of(window, period);
      best = {cut, size_of(plan.planes, cut, k.lanes), each};
    }
    return best;
  };
  const double mean_taps = static_cast<double>(h.weights) / static_cast<double>(std::max(h.out_channels, 1));
  const auto by_pixels_cost = [&](const CutSize& size, int window) {
    return pixels_cost(k, 8, size.vectors, window, mean_taps);
  };
  const bool gather = k.gather && (g.stride[1] != 1 || y.width < 4 * k.lanes);
  const Choice pixels = edges ? Choice{} : gather ? choose({1, 2}, by_pixels_cost) : choose({1}, by_pixels_cost);
  // The panel kernel needs enough filters of a block: the largest one chooses.
  int64_t widest = 0;
  for (size_t i = 0, filters = 0; i < packed.panels.size(); ++i) {
    filters = i > 0 && packed.panels[i].block == packed.panels[i - 1].block ? filters : 0;
    filters += packed.panels[i].filters;
    widest = std::max<int64_t>(widest, filters);
  }
  const auto by_panel_cost = [&](const CutSize& size, int) { return panel_cost(k, widest, size, mean_taps); };
  const bool by_panels = k.panel_cycles[0] > 0, panels = by_panels && (edges || widest >= k.mr[0] * 2);
  const Choice panel = !panels            ? Choice{}
                       : g.stride[1] == 1 ? choose({1, 2}, by_panel_cost)
                                          : choose({2, 4}, by_panel_cost);
  // Offsets of several images must fit the 32 bits of the table.
  const int64_t filters_period =
      choose_period(std::abs(x.image_stride) > (1 << 26) ? 1 : images, outputs,
                    [&](int64_t n) { return filters_cost(k, 0, 1, n * outputs, mean_taps); });

  const double pieces = outputs < k.lanes ? 1.25 : 1.0;  // a vector over several images is stored in pieces
  double total = 0;                                      // of an image
  bool any[3] = {};
  const auto add = [&](const Job& job) {
    plan.jobs.push_back(job);
    any[static_cast<int>(job.by)] = true;
  };
  const auto count = static_cast<int64_t>(packed.panels.size());
  for (int64_t i = 0; i < count;) {
    // All panels of a block by the panel kernel, or each by what is cheaper of the other two.
    int64_t end = i, filters = 0;
    for (; end < count && packed.panels[end].block == packed.panels[i].block; ++end)
      filters += packed.panels[end].filters;
    const auto taps = static_cast<double>(packed.panels[i].n_taps);
    std::vector<Job> jobs;
    double cost = 0;
    for (int64_t p = i; p < end;) {
      const Panel& one = packed.panels[p];
      const int c = kernels::width_class(one.width);
      const int nv = next_panels(packed, p, k);
      const double by_filters =
          filters_cost(k, c, nv, filters_period * outputs, taps) / static_cast<double>(filters_period);
      const double by_pixels = pixels.cut.window == 0
                                   ? 0
                                   : pieces * nv *
                                         pixels_cost(k, one.width, pixels.size.vectors, pixels.cut.window, taps) /
                                         static_cast<double>(pixels.cut.period);
      if (pixels.cut.window == 0 || by_filters <= by_pixels) {
        jobs.push_back({By::kFilters, p, nv});
        cost += by_filters;
        p += nv;
      } else {
        jobs.push_back({By::kPixels, p, 1});
        cost += by_pixels / nv;
        ++p;
      }
    }
    const double by_panel =
        panel.cut.window == 0 ? 0 : panel_cost(k, filters, panel.size, taps) / static_cast<double>(panel.cut.period);
    if (panel.cut.window != 0 && (edges || by_panel < cost)) {
      jobs = {{By::kPanel, i, static_cast<int>(end - i)}};
      cost = by_panel;
    }
    for (Job job : jobs) {
      if (job.by == By::kPanel) {
        job.collection = static_cast<int>(plan.collections.size());
        plan.collections.push_back(collect_taps(packed, packed.panels.subspan(i, job.panels), kPanelTaps, offset_of));
      }
      add(job);
    }
    total += cost;
    i = end;
  }
  // All blocks from one copy, instead?
  Cut panel_cut = panel.cut;
  if (by_panels && count > 0 && packed.panels.front().block != packed.panels.back().block) {
    Collection all = collect_taps(packed, packed.panels, kSharedTaps, offset_of);
    const auto taps = static_cast<int64_t>(all.offset.size());
    const auto cost = [&](const CutSize& size, int) { return shared_cost(k, packed, size, taps); };
    const Choice shared = g.stride[1] == 1 ? choose({1, 2}, cost) : choose({2, 4}, cost);
    if (shared.cut.window != 0 && shared.cost < total) {
      plan.jobs = {{By::kPanel, 0, static_cast<int>(count)}};
      plan.collections = {std::move(all)};
      panel_cut = shared.cut;
      any[static_cast<int>(By::kPixels)] = any[static_cast<int>(By::kFilters)] = false;
      any[static_cast<int>(By::kPanel)] = true;
    }
  }
  if (any[static_cast<int>(By::kPixels)]) {
    plan.pixels = cut_vectors(plan.planes, pixels.cut, k);
    for (int64_t t = 0; by_panels && t < h.taps; ++t) plan.offset.push_back(offset_of(packed.taps[t]));
  }
  if (any[static_cast<int>(By::kPanel)]) {
    plan.panel = cut_vectors(plan.planes, panel_cut, k);
    if (edges) plan.panel.inside = inside_of(plan.planes, kernel, panel_cut, k.lanes);
  }
  if (any[static_cast<int>(By::kFilters)]) plan.filters = cut_pixels(plan.planes, filters_period, k.lanes);
  return plan;
}

std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed) {
  const GemmCompact& k = *plan.kernels;
  std::vector<std::string> names;
  const auto name = [&](const char* by, int rows, int cols, int window) {
    return std::string("gemm_compact_f32_") + by + std::to_string(rows) + "x" + std::to_string(cols) +
           (window > 1 ? "_gather" : "") + "__" + k.isa;
  };
  for (const Job& job : plan.jobs) {
    const int width = packed.panels[job.panel].width, c = kernels::width_class(width);
    if (job.by == By::kFilters) {
      names.push_back(name("filters_", filters_tile(plan, packed, job), job.panels * width, 1));
      continue;
    }
    const PixelTiles& t = job.by == By::kPanel ? plan.panel : plan.pixels;
    int most = 0;
    for (const Tile& tile : t.tiles[c]) most = std::max(most, tile.count);
    if (job.by == By::kPanel) {
      const bool shared = !plan.collections[job.collection].slot.empty();
      names.push_back(name(shared ? "shared_" : "panel_", k.panel_rows[most - 1], most * k.lanes, t.window));
    } else {
      names.push_back(name("pixels_", k.mr[c], most * k.lanes, t.window));
    }
  }
  return names;
}

}  // namespace structadmm
