#include "ops/tap_plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <span>
#include <utility>

#include "base/check.h"
#include "base/div_up.h"
#include "ops/tap_cost.h"

namespace structadmm {
namespace {

using kernels::GemmCompact;
using By = TapPlan::By;
using Job = TapPlan::Job;
using Tile = PixelTiles::Tile;

constexpr int64_t kMaxPeriod = 16;         // images in one table of tiles
constexpr int64_t kSharing = 8;            // filters of a block, with fewer of which a copy is not tried
constexpr int64_t kFarImage = 256 * 1024;  // floats of x, from which on kernels that read its planes were slower
// Likewise, taps of a panel, where rows are short and fill no vectors: a tile's pixels at all of them have left L1 when
// its next four filters want them.
constexpr double kManyTaps = 192;

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

bool has_stride(const ConvGeometry& g) {
  return g.stride[0] > 1 || g.stride[1] > 1;
}

// Whether the planes have the halo that the kernel reaches, or kernels do without.
bool halo_fits(const Packed& packed, const ConvPlanes& p, const GemmCompact& k) {
  const kernels::PackedHeader& h = *packed.header;
  return !has_edges(p, KernelSize{h.kernel_h, h.kernel_w}) ||
         (has_copies(k) && h.kernel_h * h.kernel_w <= kernels::kMaxEdgePositions);
}

// Fills in which kernels run which panels, on which tiles.
class Chooser {
 public:
  // on_phases: what plan.planes is of; null without.
  Chooser(const char* op, const Packed& packed, int64_t images, const OnPhases* on_phases, TapPlan& plan)
      : packed_(packed),
        on_phases_(on_phases),
        plan_(plan),
        k_(*plan.kernels),
        g_(plan.planes.geometry),
        images_(images) {
    const kernels::PackedHeader& h = *packed.header;
    const Planes &x = plan.planes.x, &y = plan.planes.y;
    for (int64_t i = 0; i < h.kernel_h; ++i) {
      for (int64_t j = 0; j < h.kernel_w; ++j) {
        plan.position.push_back(i * g_.dilation[0] * x.pitch + j * g_.dilation[1]);
      }
    }
    edges_ = !on_phases && has_edges(plan.planes, kernel());
    farthest_ = plan.position.back() + (h.in_channels - 1) * x.channel_stride;
    if (on_phases) {
      farthest_ = 0;
      for (int64_t t = 0; t < h.taps; ++t) farthest_ = std::max(farthest_, offset_of(packed.taps[t]));
    }
    last_ = x.origin + (images - 1) * x.image_stride + ((y.height - 1) * g_.stride[0] - g_.padding[0]) * x.pitch +
            (y.width - 1) * g_.stride[1] - g_.padding[1];
    SADMM_CHECK(edges_ || last_ + farthest_ < x.readable, op, ": x got ", x.readable, " readable elements, wanted ",
                last_ + farthest_ + 1);
    mean_taps_ = static_cast<double>(h.weights) / static_cast<double>(std::max(h.out_channels, 1));
  }

  // Fills in the jobs and their cost.
  void choose() {
    choose_cuts();
    const auto count = static_cast<int64_t>(packed_.panels.size());
    for (int64_t i = 0, end = 0; i < count; i = end) {
      while (end < count && packed_.panels[end].block == packed_.panels[i].block) ++end;
      choose_block(i, end);
    }
    if (has_copies(k_) && count > 0 && packed_.panels.front().block != packed_.panels.back().block) try_one_copy();
    plan_.cost = cost_ + (on_phases_ ? on_phases_->cost : 0);
  }

  // And the tables, of what choose() has chosen.
  void cut() {
    const auto any = [&](By by) {
      return std::any_of(plan_.jobs.begin(), plan_.jobs.end(), [&](const Job& job) { return job.by == by; });
    };
    if (any(By::kPlanes)) cut_direct();
    if (any(By::kFilters) || any(By::kPlanes)) {
      for (int64_t t = 0; t < packed_.header->taps; ++t) plan_.offset.push_back(offset_of(packed_.taps[t]));
    }
    if (any(By::kPanel)) {
      const Collection& c = plan_.collections[0];
      const bool rest = c.slot.empty()
                            ? rest_pays(k_, widest_, panel_.size, mean_taps_)
                            : shared_rest_pays(k_, packed_, panel_.size, static_cast<int64_t>(c.offset.size()));
      plan_.panel = cut_vectors(plan_.planes, panel_.cut, k_.lanes, rest);
      if (rest) rest_offsets(c);
      if (edges_) plan_.panel.inside = inside_of(plan_.planes, kernel(), panel_.cut, k_.lanes);
    }
    if (any(By::kFilters)) plan_.filters = cut_pixels(plan_.planes, filters_period_, k_.lanes);
  }

 private:
  // How to cut the outputs, and what that costs.
  struct Choice {
    Cut cut{0, 1, 0};  // window = 0: not at all
    CutSize size;
    double cost = 0;  // of an image
    bool possible() const { return cut.window != 0; }
    // all(): of the images that are cut together. Infinite where that is not possible.
    double of_image(const auto& all) const {
      return possible() ? all() / static_cast<double>(cut.period) : std::numeric_limits<double>::infinity();
    }
  };

  int64_t outputs() const { return plan_.planes.outputs(); }
  // How pixels that fill no vector go for a block of so many filters.
  static Rest rest_of(int64_t filters) { return filters < 2 * kernels::kMaxPanel ? Rest::kAlone : Rest::kTogether; }
  KernelSize kernel() const { return {packed_.header->kernel_h, packed_.header->kernel_w}; }
  // What edges cost a copy: a mask for each of its vectors.
  double masks(const CutSize& size, double taps) const {
    return edges_ ? k_.mask_cycles[static_cast<int>(size.reads)] * static_cast<double>(size.vectors) * taps : 0;
  }
  // What the panel kernel takes longer on the planes where each tap is a page, or x large, or the taps of a panel many.
  double slower(int width, double taps) const {
    const Planes& x = plan_.planes.x;
    const int64_t floats = planes_read(plan_, packed_) * x.height * x.width;
    const int64_t row = plan_.planes.y.width;
    const bool many = width > 4 && taps > kManyTaps && row < 2 * k_.lanes && row % k_.lanes != 0;
    return plan_.pointwise() ? k_.pointwise : floats > kFarImage ? k_.far : many ? k_.many : 1.0;
  }
  int64_t offset_of(const kernels::Tap& t) const {
    return on_phases_ ? on_phases_->offset_of(t)
                      : t.channel * plan_.planes.x.channel_stride + plan_.position[t.position];
  }

  // Where a window of slack lies behind the last place that is read, vectors may begin anywhere; otherwise those of the
  // last image must not, and the tables of all images are as that of the last.
  Cut cut_of(int window, int64_t period, int most) const {
    const Planes& x = plan_.planes.x;
    const bool slack = edges_ || last_ + farthest_ + window * k_.lanes <= x.readable;
    return {window, period,
            slack ? std::numeric_limits<int64_t>::max()
                  : x.readable - farthest_ - window * k_.lanes - (images_ - 1) * x.image_stride,
            most};
  }

  // The cheapest of these windows by cost(size of a cut), and how many images to cut together.
  Choice cheapest(std::initializer_list<int> windows, int most, const auto& cost) const {
    Choice best;
    for (const int window : windows) {
      if (window == 1 && g_.stride[1] != 1) continue;
      const Cut one = cut_of(window, 1, most);
      if (one.limit < 0) continue;
      const bool slack = one.limit == std::numeric_limits<int64_t>::max();
      const auto size = [&](int64_t n) { return size_of(plan_.planes, cut_of(window, n, most), k_.lanes); };
      const auto cost_of = [&](int64_t n) { return cost(size(n)); };
      // Without a halo lanes are read one by one at the ends of x, so none may be of an image that is not there, as the
      // last of several that are cut together may be.
      const int64_t period = choose_period(slack && !edges_ ? images_ : 1, outputs(), cost_of);
      const double each = cost_of(period) / static_cast<double>(period);
      if (!best.possible() || each < best.cost) best = {cut_of(window, period, most), size(period), each};
    }
    return best;
  }
  Choice cheapest_copy(const auto& cost) const {
    return g_.stride[1] == 1 ? cheapest({1, 2}, k_.nr, cost) : cheapest({2, 4}, k_.nr, cost);
  }

  void choose_cuts() {
    // The largest block chooses for all.
    int width = 0;
    for (size_t i = 0, filters = 0; i < packed_.panels.size(); ++i) {
      filters = i > 0 && packed_.panels[i].block == packed_.panels[i - 1].block ? filters : 0;
      filters += packed_.panels[i].filters;
      widest_ = std::max<int64_t>(widest_, filters);
      width = std::max(width, packed_.panels[i].width);
    }
    const auto on_planes = [&](const CutSize& size, Rest rest) {
      return planes_cost(k_, width, size, mean_taps_, slower(width, mean_taps_), rest);
    };
    if (!edges_) {
      direct_ = cheapest({1}, width == 4 ? k_.nr_narrow : k_.nr, [&](const CutSize& size) {
        return std::min(on_planes(size, Rest::kVector), on_planes(size, rest_of(widest_)));
      });
    }
    rest_ = direct_.possible() && on_planes(direct_.size, rest_of(widest_)) < on_planes(direct_.size, Rest::kVector);
    // A copy needs enough filters that share it.
    const auto by_panel = [&](const CutSize& size) {
      return panel_cost(k_, widest_, size, mean_taps_) + masks(size, mean_taps_);
    };
    if (has_copies(k_) && (edges_ || widest_ >= kSharing)) panel_ = cheapest_copy(by_panel);
    // Offsets of several images must fit the 32 bits of the table.
    filters_period_ = choose_period(std::abs(plan_.planes.x.image_stride) > (1 << 26) ? 1 : images_, outputs(),
                                    [&](int64_t n) { return filters_cost(k_, 0, 1, n * outputs(), mean_taps_); });
  }

  // Panels begin to end, of one block: all by the panel kernel from a copy, or as many as filters kernels take together
  // by what is cheaper of the others.
  void choose_block(int64_t begin, int64_t end) {
    const auto taps = static_cast<double>(packed_.panels[begin].n_taps);
    std::vector<Job> jobs;
    double cost = 0;
    int64_t filters = 0;
    for (int64_t p = begin; p < end; ++p) filters += packed_.panels[p].filters;
    const Rest rest = rest_ ? rest_of(filters) : Rest::kVector;
    for (int64_t p = begin; p < end;) {
      const int width = packed_.panels[p].width, nv = next_panels(packed_, p, k_);
      const double by_filters = filters_cost(k_, kernels::width_class(width), nv, filters_period_ * outputs(), taps) /
                                static_cast<double>(filters_period_);
      const double on_planes =
          direct_.of_image([&] { return planes_cost(k_, width, direct_.size, taps, slower(width, taps), rest); });
      if (by_filters <= nv * on_planes) {
        jobs.push_back({By::kFilters, p, nv});
        cost += by_filters;
      } else {
        for (int i = 0; i < nv; ++i) jobs.push_back({By::kPlanes, p + i, 1});
        cost += nv * on_planes;
      }
      p += nv;
    }
    const double by_panel =
        panel_.of_image([&] { return panel_cost(k_, filters, panel_.size, taps) + masks(panel_.size, taps); });
    if (panel_.possible() && (edges_ || by_panel < cost)) {
      jobs = {{By::kPanel, begin, static_cast<int>(end - begin), static_cast<int>(plan_.collections.size())}};
      plan_.collections.push_back(collect(packed_.panels.subspan(begin, end - begin), k_.panel_taps));
      cost = by_panel;
    }
    plan_.jobs.insert(plan_.jobs.end(), jobs.begin(), jobs.end());
    cost_ += cost;
  }

  // All blocks from one copy, if that is cheaper.
  void try_one_copy() {
    Collection all = collect(packed_.panels, kSharedTaps);
    const auto taps = static_cast<int64_t>(all.offset.size());
    int64_t own = 0;  // of each block
    for (size_t i = 0; i < packed_.panels.size(); ++i) {
      if (i == 0 || packed_.panels[i].block != packed_.panels[i - 1].block) own += packed_.panels[i].n_taps;
    }
    // No two blocks have a tap in common (conv groups): a copy of each is as small, and read in order.
    if (taps == own && panel_.possible()) return;
    const Choice shared = cheapest_copy([&](const CutSize& size) {
      return shared_cost(k_, packed_, size, taps) + masks(size, static_cast<double>(taps));
    });
    if (!shared.possible() || shared.cost >= cost_) return;
    plan_.jobs = {{By::kPanel, 0, static_cast<int>(packed_.panels.size())}};
    plan_.collections = {std::move(all)};
    panel_ = shared;
    cost_ = shared.cost;
  }

  Collection collect(std::span<const Panel> panels, int64_t most) const {
    return collect_taps(packed_, panels, most, [&](const kernels::Tap& t) { return offset_of(t); });
  }

  void cut_direct() {
    const auto on_planes = [](const Job& job) { return job.by == By::kPlanes; };
    plan_.direct = cut_vectors(plan_.planes, direct_.cut, k_.lanes, rest_);
    if (!rest_) return;
    const bool together = rest_together(k_, direct_.size.rest);
    // Panels that follow one another go together as far as kernels take them, with the last of them.
    for (size_t i = 0; i < plan_.jobs.size(); ++i) {
      Job& job = plan_.jobs[i];
      if (!on_planes(job)) continue;
      job.rest = 1;
      if (!together || i == 0) continue;
      Job& before = plan_.jobs[i - 1];
      const Panel &p = packed_.panels[before.panel], &q = packed_.panels[job.panel];
      const bool follows = on_planes(before) && before.panel + 1 == job.panel && p.block == q.block &&
                           p.width == kernels::kMaxPanel && q.width == kernels::kMaxPanel;
      if (follows && before.rest < kernels::kMaxPanels) job.rest = std::exchange(before.rest, 0) + 1;
    }
  }

  void rest_offsets(const Collection& c) {
    for (const int64_t slot : c.slot) plan_.rest_offset.push_back(slot * k_.lanes);
    for (int64_t t = 0; c.slot.empty() && t < k_.panel_taps; ++t) plan_.rest_offset.push_back(t * k_.lanes);
  }

  const Packed& packed_;
  const OnPhases* const on_phases_;
  TapPlan& plan_;
  const GemmCompact& k_;
  const ConvGeometry& g_;
  const int64_t images_;
  bool edges_ = false;               // x has no halo where the kernel reaches beyond it
  int64_t farthest_ = 0, last_ = 0;  // of a tap from its output's place; the last output's place
  double mean_taps_ = 0, cost_ = 0;  // cost_: of the jobs, an image
  Choice direct_, panel_;
  bool rest_ = false;  // whether pixels that fill no vector are multiplied one by one on the planes
  int64_t filters_period_ = 1, widest_ = 0;  // widest_: filters of a block, at most
};

}  // namespace

bool takes_edges(const Packed& packed, const ConvGeometry& g, int64_t batch, int64_t height, int64_t width, Isa isa) {
  const kernels::PackedHeader& h = *packed.header;
  const GemmCompact& k = kernels::gemm_compact(isa);
  const bool collects =
      has_copies(k) && h.kernel_h * h.kernel_w <= kernels::kMaxEdgePositions && (batch == 1 || k.mask_cycles[0] == 0);
  if (h.taps == 0 || (!collects && !has_stride(g))) return false;
  const int64_t in[] = {height, width}, kernel[] = {h.kernel_h, h.kernel_w};
  int64_t out[2], behind[2];
  for (const int a : {0, 1}) {
    const int64_t reach = g.dilation[a] * (kernel[a] - 1);
    out[a] = (in[a] + 2 * g.padding[a] - reach - 1) / g.stride[a] + 1;
    behind[a] = std::max<int64_t>(0, (out[a] - 1) * g.stride[a] + reach - g.padding[a] - (in[a] - 1));
  }
  const Planes bare = tensor_planes(Dtype::kF32, 1, h.in_channels, height, width),
               y = tensor_planes(Dtype::kF32, 1, h.out_channels, out[0], out[1]),
               padded = arena_planes(Dtype::kF32, 1, h.in_channels, height, width,
                                     {g.padding[0], g.padding[1], behind[0], behind[1]});
  if (!collects && !phases_of(packed, {bare, y, y, g}, 1, k.lanes, isa)) return false;
  const auto plan = [&](const Planes& x) { return plan_taps("takes_edges", packed, g, x, y, nullptr, {}, 1, isa); };
  const TapPlan on_bare = plan(bare);
  if (!collects && !on_bare.phases) return false;
  const double copy =
      static_cast<double>(static_cast<int64_t>(packed.channels.size()) * height) * row_copy_cost(1, width, k.lanes);
  return on_bare.cost < plan(padded).cost + copy;
}

TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& geometry, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa, bool phases) {
  TapPlan plan{.kernels = &kernels::gemm_compact(isa),
               .planes = {x, y, residual ? *residual : y, geometry},
               .phases = {},
               .epilogue = epilogue,
               .position = {},
               .offset = {},
               .rest_offset = {},
               .collections = {},
               .jobs = {},
               .direct = {},
               .panel = {},
               .filters = {}};
  check_planes(op, plan.planes, packed.header->in_channels, packed.header->out_channels,
               {packed.header->kernel_h, packed.header->kernel_w});
  images = std::max<int64_t>(images, 1);
  const bool fits = halo_fits(packed, plan.planes, *plan.kernels);
  std::optional<OnPhases> on;
  if (phases && has_stride(geometry) && packed.header->taps > 0) {
    on = phases_of(packed, plan.planes, images, plan.kernels->lanes, isa);
  }
  SADMM_CHECK(fits || on, op, ": x got a halo of ", x.halo.top, " and ", x.halo.left, " before it, ", x.halo.bottom,
              " and ", x.halo.right, " behind, wanted what the kernel reaches");
  TapPlan copied = plan;
  std::optional<Chooser> on_x, on_copy;
  if (fits) on_x.emplace(op, packed, images, nullptr, plan).choose();
  if (on) {
    copied.planes = on->planes;
    copied.phases = on->phases;
    on_copy.emplace(op, packed, on->phases.images, &*on, copied).choose();
  }
  if (on_x && (!on_copy || plan.cost <= copied.cost)) {
    on_x->cut();
    return plan;
  }
  on_copy->cut();
  return copied;
}

std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed) {
  const GemmCompact& k = *plan.kernels;
  std::vector<std::string> names;
  const auto name = [&](const char* by, int rows, int cols, int window, bool rest = false) {
    return std::string("gemm_compact_f32_") + by + std::to_string(rows) + "x" + std::to_string(cols) +
           (window > 1 ? "_gather" : "") + (plan.phases ? "_phases" : "") + (rest ? "_rest" : "") + "__" + k.isa;
  };
  for (const Job& job : plan.jobs) {
    if (job.by == By::kFilters) {
      const int width = packed.panels[job.panel].width;
      names.push_back(name("filters_", filters_tile(plan, packed, job), job.panels * width, 1));
      continue;
    }
    const bool copy = job.by == By::kPanel, shared = copy && !plan.collections[job.collection].slot.empty();
    const PixelTiles& t = copy ? plan.panel : plan.direct;
    int most = 0;
    for (const Tile& tile : t.tiles) most = std::max(most, tile.count);
    names.push_back(name(shared ? "shared_"
                         : copy ? "panel_"
                                : "planes_",
                         k.panel_rows[most - 1], most * k.lanes, t.window, t.tiles.back().rest > 0));
  }
  return names;
}

}  // namespace structadmm
