#include "ops/tap_plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "base/check.h"
#include "base/div_up.h"

namespace structadmm {
namespace {

using kernels::FiltersArgs;
using kernels::GemmCompact;
using kernels::Output;
using kernels::PixelsArgs;
using kernels::PixelStore;
using kernels::PixelVector;
using Job = TapPlan::Job;
using Tile = TapPlan::Tile;

constexpr int64_t kStripFloats = 64 * 1024;  // of x, for which all panels are done before the next strip
constexpr int64_t kSharePixels = 192;        // of a thread, below which its tiles would be cut short
constexpr int64_t kSerialMacs = 1 << 20;     // ten microseconds of work: a parallel region costs as much
constexpr int64_t kMaxPeriod = 16;           // images in one table of tiles
constexpr int64_t kSpan = kernels::kMaxSpan;
constexpr int64_t kBlockFloats = 6 * 1024;   // of the weights of a job, which tiles of a span read from L1
constexpr int64_t kFarStrips = 4;            // of x, with more of which it does not stay in L2
constexpr int64_t kFarWeights = 256 * 1024;  // floats, likewise

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

double pixels_cost(const GemmCompact& k, int width, int64_t vectors, bool gather, double taps) {
  const int c = kernels::width_class(width);
  const int64_t tiles = div_up(vectors, k.nr[c]), least = vectors / tiles, more = vectors % tiles;
  const double cycles = static_cast<double>(tiles - more) * k.pixels_cycles[c][least - 1] +
                        (more == 0 ? 0.0 : static_cast<double>(more) * k.pixels_cycles[c][least]);
  constexpr double kGather = 1.5;  // a second load and a permutation per vector
  return (cycles * (gather ? kGather : 1.0) * taps + 35.0 * static_cast<double>(vectors)) * (width / k.mr[c]);
}

// The outputs of some images in order, and where each reads x (at kernel position 0, channel 0) and writes y.
class Outputs {
 public:
  Outputs(const TapPlan& plan, const ConvGeometry& g, int64_t images)
      : plan_(plan),
        row_(g.stride[0] * plan.x.pitch),
        column_(g.stride[1]),
        base_(plan.x.origin - g.padding[0] * plan.x.pitch - g.padding[1]),
        images_(images) {}
  bool done() const { return n_ == images_ || plan_.outputs == 0; }
  void next() {
    if (++ox_ < plan_.y.width) return;
    ox_ = 0;
    if (++oy_ < plan_.y.height) return;
    oy_ = 0;
    ++n_;
  }
  int64_t image() const { return n_; }
  int64_t x() const { return base_ + n_ * plan_.x.image_stride + oy_ * row_ + ox_ * column_; }
  int64_t y() const { return plan_.y.at(n_, 0, oy_, ox_); }
  int64_t residual() const { return plan_.residual.at(n_, 0, oy_, ox_); }

 private:
  const TapPlan& plan_;
  int64_t row_, column_, base_, images_;
  int64_t n_ = 0, oy_ = 0, ox_ = 0;
};

// The output `o` is lane `lane` of a vector whose stores begin at `first`: to the last of them, or to another one.
void add_to_stores(const Outputs& o, int lane, int lanes, size_t first, std::vector<PixelStore>& stores) {
  const auto fits = [&](const PixelStore& s) {
    const int64_t at = o.y() - s.y;
    return s.image == o.image() && at >= 0 && at < lanes && o.residual() - s.residual == at;
  };
  if (stores.size() == first || !fits(stores.back())) {
    stores.push_back({o.y(), o.residual(), 0, static_cast<int32_t>(o.image()), {}, true});
  }
  PixelStore& s = stores.back();
  s.lanes |= 1u << (o.y() - s.y);
  s.from[o.y() - s.y] = static_cast<int8_t>(lane);
  s.straight = s.straight && o.y() - s.y == lane;
}

// Calls lane(output, lane, offset) for every output, and begins(offset) before the first of each vector: without
// gather, consecutive places of x, those between outputs included; with it, consecutive outputs within two vectors of
// places. limit: the last offset from which a vector may be read.
template <class Begins, class Lane>
void for_vectors(Outputs o, bool gather, int lanes, int64_t limit, const Begins& begins, const Lane& each) {
  const int64_t room = (gather ? 2 : 1) * lanes;
  while (!o.done()) {
    const int64_t offset = std::min(o.x(), limit);
    begins(offset);
    for (int n = 0; n < lanes && !o.done(); ++n, o.next()) {
      const int64_t at = o.x() - offset;
      if (at < 0 || at >= room) break;
      each(o, gather ? n : static_cast<int>(at), at);
    }
  }
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

void check_planes(const char* op, const Packed& packed, const ConvGeometry& g, const TapPlan& p) {
  const kernels::PackedHeader& h = *packed.header;
  const int64_t kernel[] = {h.kernel_h, h.kernel_w}, in[] = {p.x.height, p.x.width}, out[] = {p.y.height, p.y.width};
  const int64_t before[] = {p.x.halo.top, p.x.halo.left}, behind[] = {p.x.halo.bottom, p.x.halo.right};
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
    const int64_t over =
        (out[axis] - 1) * g.stride[axis] + g.dilation[axis] * (kernel[axis] - 1) - g.padding[axis] - (in[axis] - 1);
    SADMM_CHECK(before[axis] >= g.padding[axis] && behind[axis] >= over, op, ": x got a halo of ", before[axis],
                " and ", behind[axis], ", wanted ", g.padding[axis], " and ", std::max<int64_t>(over, 0));
  }
  SADMM_CHECK(p.x.pitch >= 0 && p.x.image_stride >= 0 && p.x.channel_stride >= 0, op,
              ": x got negative strides, wanted none");
}

void cut_vectors(TapPlan& plan, const ConvGeometry& g, int64_t limit) {
  const GemmCompact& k = *plan.kernels;
  auto& t = plan.pixels;
  for_vectors(
      Outputs(plan, g, t.period), t.gather, k.lanes, limit,
      [&](int64_t offset) { t.vectors.push_back({offset, static_cast<int32_t>(t.stores.size()), 0, {}}); },
      [&](const Outputs& o, int lane, int64_t at) {
        PixelVector& v = t.vectors.back();
        v.lane[lane] = static_cast<int8_t>(at);
        add_to_stores(o, lane, k.lanes, static_cast<size_t>(v.first_store), t.stores);
        v.stores = static_cast<int32_t>(t.stores.size()) - v.first_store;
      });
  for (int c = 0; c < 3; ++c) {
    const auto count = static_cast<int64_t>(t.vectors.size());
    const int64_t tiles = div_up(count, k.nr[c]);
    for (int64_t i = 0; i < tiles; ++i) {
      t.tiles[c].push_back({i * count / tiles, static_cast<int>((i + 1) * count / tiles - i * count / tiles)});
    }
  }
}

void cut_pixels(TapPlan& plan, const ConvGeometry& g) {
  const GemmCompact& k = *plan.kernels;
  auto& t = plan.filters;
  t.spans = div_up(t.period * plan.outputs, kSpan);
  int lane = 0;
  for (Outputs o(plan, g, t.period); !o.done(); o.next(), lane = (lane + 1) % k.lanes) {
    if (lane == 0) t.vectors.push_back({static_cast<int64_t>(t.stores.size()), 0});
    kernels::StoreRange& vector = t.vectors.back();
    t.pixel.push_back(static_cast<int32_t>(o.x()));
    add_to_stores(o, lane, k.lanes, static_cast<size_t>(vector.first), t.stores);
    vector.count = static_cast<int>(static_cast<int64_t>(t.stores.size()) - vector.first);
  }
}

// The most pixels of a tile of these panels.
int most_pixels(const TapPlan& plan, const Packed& packed, const Job& job) {
  return plan.kernels->pixels[kernels::width_class(packed.panels[job.panel].width)][job.panels - 1];
}

// Tiles of one job over `images` images.
int64_t job_units(const TapPlan& plan, const Packed& packed, const Job& job, int64_t images) {
  if (job.panels > 0) return div_up(images, plan.filters.period) * plan.filters.spans;
  const int c = kernels::width_class(packed.panels[job.panel].width);
  return div_up(images, plan.pixels.period) * static_cast<int64_t>(plan.pixels.tiles[c].size());
}

// Tiles begin to end of a job's `units`: its share of a strip.
struct Share {
  int64_t begin, end, units;
  // Whether x lies beyond L2, and comes in a strip ahead of its use.
  bool far() const { return units > kFarStrips * (end - begin) && end < units; }
};

struct Operands {
  const float *x, *residual;
  float* y;
  int64_t images;
};

// The output of a job whose first filter is `filter`, for images from `image` on.
Output output_of(const TapPlan& plan, const Operands& data, int64_t filter) {
  return {.y = data.y + filter * plan.y.channel_stride,
          .y_stride = plan.y.channel_stride,
          .residual = data.residual ? data.residual + filter * plan.residual.channel_stride : nullptr,
          .residual_stride = plan.residual.channel_stride,
          .stores = nullptr,
          .images = 0,
          .epilogue = plan.epilogue};
}

void to_image(const TapPlan& plan, const Output& first, int64_t image, int64_t images, Output& o) {
  o.y = first.y + image * plan.y.image_stride;
  if (first.residual) o.residual = first.residual + image * plan.residual.image_stride;
  o.images = static_cast<int>(images);
}

void run_filters(const TapPlan& plan, const Packed& packed, const Job& job, const Operands& data, const Share& share) {
  const GemmCompact& k = *plan.kernels;
  const auto& t = plan.filters;
  const Panel& panel = packed.panels[job.panel];
  const Panel& last = packed.panels[job.panel + job.panels - 1];
  const int most = most_pixels(plan, packed, job), filters = last.first_filter + last.filters - panel.first_filter;
  const auto& kernel = k.filters_kernel[kernels::width_class(panel.width)][job.panels - 1];
  const Output out = output_of(plan, data, panel.first_filter);
  FiltersArgs a{.x = nullptr,
                .channel_stride = plan.x.channel_stride,
                .position_offset = plan.position.data(),
                .taps = packed.taps + panel.first_tap,
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
  const bool pointwise = plan.position.size() == 1;
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
    const int64_t first = u % t.spans * kSpan, count = std::min(kSpan, images * plan.outputs - first);
    if (count <= 0) continue;
    a.x = data.x + image * plan.x.image_stride;
    const int64_t tiles = div_up(count, most);
    float* const to = sums + (waits.sums == sums ? kSums : 0);
    const int64_t next = std::min(kSpan, static_cast<int64_t>(t.pixel.size()) - first - kSpan);
    const bool far = pointwise && share.far() && next > 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = block * panel.n_taps / blocks;
      a.taps = packed.taps + panel.first_tap + from;
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

void run_pixels(const TapPlan& plan, const Packed& packed, const Job& job, const Operands& data, const Share& share) {
  const GemmCompact& k = *plan.kernels;
  const auto& t = plan.pixels;
  const Panel& panel = packed.panels[job.panel];
  const int c = kernels::width_class(panel.width);
  const auto tiles = static_cast<int64_t>(t.tiles[c].size());
  const auto& kernel = k.pixels_kernel[t.gather][c];
  const Output out = output_of(plan, data, panel.first_filter + job.first);
  PixelsArgs a{.x = nullptr,
               .channel_stride = plan.x.channel_stride,
               .position_offset = plan.position.data(),
               .taps = packed.taps + panel.first_tap,
               .n_taps = panel.n_taps,
               .w = packed.weights + panel.weight + job.first,
               .w_stride = panel.width,
               .bias = packed.bias + panel.first_filter + job.first,
               .filters = std::min(panel.filters - job.first, k.mr[c]),
               .vectors = nullptr,
               .out = out};
  a.out.stores = t.stores.data();
  // The first jobs fetch one vector of the tile each.
  const int64_t fetches = &job - plan.jobs.data();
  const bool far = plan.position.size() == 1 && share.far() && fetches < k.nr[c];
  for (int64_t u = share.begin; u < share.end; ++u) {
    const int64_t image = u / tiles * t.period, images = std::min(t.period, data.images - image);
    const Tile& tile = t.tiles[c][u % tiles];
    a.vectors = t.vectors.data() + tile.first;
    if (far) {
      const int64_t ahead = u + share.end - share.begin;
      const Tile& later = t.tiles[c][ahead % tiles];
      a.ahead = ahead < share.units ? t.vectors[later.first + fetches % later.count].offset +
                                          (ahead / tiles * t.period - image) * plan.x.image_stride
                                    : 0;
    }
    int n = tile.count;
    while (n > 0 && t.stores[a.vectors[n - 1].first_store].image >= images) --n;
    if (n == 0) continue;
    a.x = data.x + image * plan.x.image_stride;
    to_image(plan, out, image, images, a.out);
    kernel[n - 1](a);
  }
}

}  // namespace

TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& g, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa) {
  const kernels::PackedHeader& h = *packed.header;
  TapPlan plan{.kernels = &kernels::gemm_compact(isa),
               .x = x,
               .y = y,
               .residual = residual ? *residual : y,
               .epilogue = epilogue,
               .outputs = y.height * y.width,
               .position = {},
               .jobs = {},
               .pixels = {},
               .filters = {}};
  check_planes(op, packed, g, plan);
  const GemmCompact& k = *plan.kernels;
  images = std::max<int64_t>(images, 1);
  for (int64_t i = 0; i < h.kernel_h; ++i) {
    for (int64_t j = 0; j < h.kernel_w; ++j) {
      plan.position.push_back(i * g.dilation[0] * x.pitch + j * g.dilation[1]);
    }
  }

  // Where two vectors of slack lie behind the last place that is read, vectors may begin anywhere; otherwise those of
  // the last image must not, and the tables of all images are as that of the last.
  const int64_t farthest = plan.position.back() + (h.in_channels - 1) * x.channel_stride;
  const int64_t last = x.origin + (images - 1) * x.image_stride +
                       ((y.height - 1) * g.stride[0] - g.padding[0]) * x.pitch + (y.width - 1) * g.stride[1] -
                       g.padding[1];
  SADMM_CHECK(last + farthest < x.readable, op, ": x got ", x.readable, " readable elements, wanted ",
              last + farthest + 1);
  const bool slack = last + farthest + 2 * k.lanes <= x.readable;
  const auto limit = [&](bool gather) {
    const int64_t room = (gather ? 2 : 1) * k.lanes;
    return slack ? std::numeric_limits<int64_t>::max() : x.readable - farthest - room - (images - 1) * x.image_stride;
  };
  const double mean_taps = static_cast<double>(h.weights) / static_cast<double>(std::max(h.out_channels, 1));
  auto& px = plan.pixels;
  bool pixels = false;
  double pixels_best = 0;
  int64_t vectors = 0;
  for (const bool gather : {false, true}) {
    if (gather ? !k.gather || (g.stride[1] == 1 && y.width >= 4 * k.lanes) : g.stride[1] != 1) continue;
    if (limit(gather) < 0) continue;
    const auto count = [&](int64_t n) {
      int64_t vectors = 0;
      for_vectors(
          Outputs(plan, g, n), gather, k.lanes, limit(gather), [&](int64_t) { ++vectors; },
          [](const Outputs&, int, int64_t) {});
      return vectors;
    };
    const auto cost = [&](int64_t n) { return pixels_cost(k, 8, count(n), gather, mean_taps); };
    const int64_t period = choose_period(slack ? images : 1, plan.outputs, cost);
    const double best = cost(period) / static_cast<double>(period);
    if (pixels && best >= pixels_best) continue;
    pixels = true;
    pixels_best = best;
    px.gather = gather;
    px.period = period;
    vectors = count(period);
  }
  // Offsets of several images must fit the 32 bits of the table.
  auto& fl = plan.filters;
  fl.period = choose_period(std::abs(x.image_stride) > (1 << 26) ? 1 : images, plan.outputs,
                            [&](int64_t n) { return filters_cost(k, 0, 1, n * plan.outputs, mean_taps); });

  const double pieces = plan.outputs < k.lanes ? 1.25 : 1.0;  // a vector over several images is stored in pieces
  bool any_pixels = false, any_filters = false;
  const auto count = static_cast<int64_t>(packed.panels.size());
  for (int64_t i = 0; i < count;) {
    const Panel& panel = packed.panels[i];
    const int c = kernels::width_class(panel.width);
    const int nv = next_panels(packed, i, k);
    const auto taps = static_cast<double>(panel.n_taps);
    const double by_filters = filters_cost(k, c, nv, fl.period * plan.outputs, taps) / static_cast<double>(fl.period);
    const double by_pixels =
        pixels ? pieces * nv * pixels_cost(k, panel.width, vectors, px.gather, taps) / static_cast<double>(px.period)
               : 0;
    if (!pixels || by_filters <= by_pixels) {
      plan.jobs.push_back({i, nv, 0});
      any_filters = true;
      i += nv;
    } else {
      for (int first = 0; first < panel.filters; first += k.mr[c]) plan.jobs.push_back({i, 0, first});
      any_pixels = true;
      ++i;
    }
  }
  if (any_pixels) cut_vectors(plan, g, limit(px.gather));
  if (any_filters) cut_pixels(plan, g);
  return plan;
}

void run_taps(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
              int64_t images, Parallel& parallel) {
  const Operands data{x, residual, y, images};
  const int64_t macs = packed.header->weights * plan.outputs * images;
  const int64_t tasks = macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
  // All panels over one strip of pixels before the next strip, so that what they read of x stays in L2.
  const int64_t read = images * plan.x.height * plan.x.width * static_cast<int64_t>(packed.channels.size());
  const int64_t pixels = images * plan.outputs;
  // Threads that divide the pixels, not the filters, find in their own caches what they wrote in the layer before.
  const int64_t shares = tasks > 1 && pixels >= kSharePixels * parallel.threads() ? parallel.threads() : 1;
  const int64_t strips =
      std::clamp<int64_t>(div_up(div_up(read, kStripFloats), shares) * shares, 1, std::max<int64_t>(pixels, 1));
  int64_t units = 0;
  for (const Job& job : plan.jobs) units += job_units(plan, packed, job, images);
  parallel.run(tasks, [&](int64_t task) {
    const int64_t first = task * units / tasks, last = (task + 1) * units / tasks;
    int64_t at = 0;  // units before this strip of this job
    for (int64_t strip = 0; strip < strips && at < last; ++strip) {
      for (const Job& job : plan.jobs) {
        const int64_t n = job_units(plan, packed, job, images);
        const int64_t low = strip * n / strips, high = (strip + 1) * n / strips;
        const int64_t begin = low + std::max<int64_t>(0, first - at), end = std::min(high, low + last - at);
        at += high - low;
        if (begin >= end) continue;
        (job.panels > 0 ? run_filters : run_pixels)(plan, packed, job, data, {begin, end, n});
      }
    }
  });
}

std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed) {
  const GemmCompact& k = *plan.kernels;
  std::vector<std::string> names;
  for (const Job& job : plan.jobs) {
    const int width = packed.panels[job.panel].width, c = kernels::width_class(width);
    int most = 0;
    for (const Tile& tile : plan.pixels.tiles[c]) most = std::max(most, tile.count);
    const std::string by = job.panels > 0 ? "filters_" + std::to_string(most_pixels(plan, packed, job)) + "x" +
                                                std::to_string(job.panels * width)
                                          : "pixels_" + std::to_string(k.mr[c]) + "x" + std::to_string(most * k.lanes) +
                                                (plan.pixels.gather ? "_gather" : "");
    names.push_back("gemm_compact_f32_" + by + "__" + k.isa);
  }
  return names;
}

}  // namespace structadmm
