#include "ops/conv_compact.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "base/check.h"
#include "kernels/pad_copy/pad_copy.h"

namespace structadmm {
namespace {

using kernels::FiltersArgs;
using kernels::GemmCompact;
using kernels::PadCopyArgs;
using kernels::PixelsArgs;
using kernels::PixelSegment;
using kernels::PixelVector;

constexpr int64_t kScratchFloats = 64 * 1024;  // images copied at a time: with some panels and their part of y in L2
constexpr int64_t kStripFloats = 64 * 1024;    // of x, for which all panels are done before the next strip
constexpr int64_t kSerialMacs = 1 << 20;       // ten microseconds of work: two parallel regions would cost as much
constexpr int64_t kMaxPeriod = 16;             // images in one table of tiles

// One axis of the padded copy. Where pixels form vectors, the copy is split by phase (input index modulo stride), so
// that neighbouring outputs read neighbouring floats; elsewhere it is not, and outputs are `step` apart.
struct Axis {
  struct Phase {
    int64_t offset, lead, count, first;  // first padded index, zeros before, data, input index of the first datum
  };
  int64_t out = 0, in_step = 1, step = 1, pitch = 0, tail = 0;
  std::vector<Phase> phases;       // those that some kernel position reads
  std::vector<int64_t> slot, add;  // per kernel position: its phase, and where it begins in it
};

Axis make_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool split) {
  Axis a;
  a.out = out;
  a.in_step = split ? stride : 1;
  a.step = split ? 1 : stride;
  const int64_t reach = (kernel - 1) * dilation / a.in_step;
  const int64_t length = (out - 1) * a.step + 1 + reach;
  // Zeros that trail a line also lead the next one; more than `reach` of them would make two outputs read one place.
  int64_t share = reach;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t q = k * dilation % a.in_step;
    size_t s = 0;
    while (s < a.phases.size() && a.phases[s].offset != q) ++s;
    if (s == a.phases.size()) {
      const int64_t lead = std::min(length, padding > q ? (padding - q + a.in_step - 1) / a.in_step : 0);
      const int64_t first = lead * a.in_step + q - padding;
      const int64_t count = first < in ? std::min((in - 1 - first) / a.in_step + 1, length - lead) : 0;
      a.phases.push_back({q, lead, count, first});
      share = std::min({share, lead, length - lead - count});
    }
    a.slot.push_back(static_cast<int64_t>(s));
    a.add.push_back(k * dilation / a.in_step);
  }
  a.pitch = length - share;
  a.tail = share;
  return a;
}

// Where pixels and taps lie in what the kernels read: the padded copy of a chunk of images, or x itself.
struct Layout {
  bool direct = false;
  Axis h, w;
  int64_t pitch = 0, image_stride = 0, channel_stride = 0;
  int64_t plane = 0;              // padded copy: floats of one phase of one channel
  int64_t limit = 0;              // direct: last float of a channel that may be read, less the largest tap offset
  std::vector<int64_t> position;  // offset of each kernel position
  int64_t chunk = 1;              // images at a time
};

// A panel under the pixels kernel (panels = 0; mr filters from its `first`), or some panels under the filters kernel.
struct Job {
  int64_t panel;
  int panels, first;
};

struct Tile {
  int64_t first;
  int count;
};

// How the outputs of `period` images are cut into vectors of pixels, and those into tiles.
struct PixelTiles {
  bool gather = false;
  int64_t period = 1;
  std::vector<PixelVector> vectors;
  std::vector<PixelSegment> segments;
  std::vector<Tile> tiles[3];  // per width class
};

// The outputs of `period` images one by one, cut into tiles of GemmCompact::pixels.
struct FilterTiles {
  int64_t period = 1;
  std::vector<int32_t> pixel, out;
};

struct Plan {
  const GemmCompact* kernels;
  int64_t out_h, out_w, outputs;
  Layout layout;
  std::vector<Job> jobs;
  PixelTiles pixels;
  FilterTiles filters;
};

int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

double filters_cost(const GemmCompact& k, int width_class, int panels, int64_t pixels) {
  const int64_t rest = pixels % k.pixels;
  const double last = rest == 0 ? 0.0 : std::max(0.4, static_cast<double>(rest) / k.pixels);
  return (static_cast<double>(pixels / k.pixels) + last) * k.filters_cycles[width_class][panels - 1];
}

double pixels_cost(const GemmCompact& k, int width, int64_t vectors, bool gather) {
  const int c = kernels::width_class(width);
  const int64_t tiles = div_up(vectors, k.nr[c]), least = vectors / tiles, more = vectors % tiles;
  const double cycles = static_cast<double>(tiles - more) * k.pixels_cycles[c][least - 1] +
                        (more == 0 ? 0.0 : static_cast<double>(more) * k.pixels_cycles[c][least]);
  return cycles * (width / k.mr[c]) * (gather ? 1.12 : 1.0);  // a second load and a permutation per vector
}

Layout make_layout(const Conv2dShape& s, const PackedHeader& p, bool direct, bool split) {
  Layout l;
  l.direct = direct;
  l.h = make_axis(s.height, s.out_h, p.kernel_h, s.stride[0], s.padding[0], s.dilation[0], split);
  l.w = make_axis(s.width, s.out_w, p.kernel_w, s.stride[1], s.padding[1], s.dilation[1], split);
  l.position.resize(static_cast<size_t>(p.kernel_h) * p.kernel_w);
  if (direct) {
    l.pitch = s.x_strides[2];
    l.image_stride = s.x_strides[0];
    l.channel_stride = s.x_strides[1];
    l.chunk = std::max<int64_t>(s.batch, 1);
  } else {
    l.pitch = l.w.pitch;
    l.image_stride = l.h.pitch * l.pitch;
    const int64_t image = l.image_stride * p.in_channels * static_cast<int64_t>(l.h.phases.size() * l.w.phases.size());
    l.chunk = std::clamp<int64_t>(kScratchFloats / std::max<int64_t>(image, 1), 1, std::max<int64_t>(s.batch, 1));
    int64_t lead = 0;
    for (const auto& phase : l.w.phases) lead = std::max(lead, phase.lead);
    // The spill of pad_copy, then to an odd number of cache lines: planes apart by a power of two would share few cache
    // sets.
    l.plane = l.chunk * l.image_stride + l.h.tail * l.pitch + l.w.tail + lead + 16;
    l.plane = (div_up(l.plane, 16) | 1) * 16;
    l.channel_stride = l.plane * static_cast<int64_t>(l.h.phases.size() * l.w.phases.size());
  }
  int64_t most = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t plane = l.h.slot[i] * static_cast<int64_t>(l.w.phases.size()) + l.w.slot[j];
      const int64_t offset = (direct ? 0 : plane * l.plane) + l.h.add[i] * l.pitch + l.w.add[j];
      l.position[i * p.kernel_w + j] = offset;
      most = std::max(most, offset);
    }
  }
  l.limit = (s.height - 1) * l.pitch + s.width - 1 - most;
  return l;
}

// Whether every vector of consecutive outputs lies within two vectors of the layout.
bool gather_fits(const Plan& plan, int64_t period) {
  const Layout& l = plan.layout;
  const int64_t lanes = plan.kernels->lanes, total = period * plan.outputs;
  const auto place = [&](int64_t i) {
    const int64_t in_image = i % plan.outputs;
    return i / plan.outputs * l.image_stride + in_image / plan.out_w * l.pitch + in_image % plan.out_w;
  };
  for (int64_t i = 0; i < total; i += lanes) {
    if (place(std::min(i + lanes, total) - 1) - place(i) >= 2 * lanes) return false;
  }
  return true;
}

// The vectors of `period` images: without gather, consecutive places of the layout, halos included; with it,
// consecutive outputs, which the caller knows to fit.
void cut_vectors(const Plan& plan, int64_t out_image_stride, PixelTiles& t) {
  const GemmCompact& k = *plan.kernels;
  const Layout& l = plan.layout;
  const int64_t room = (t.gather ? 2 : 1) * k.lanes - 1;
  const int64_t total = t.period * plan.outputs;
  int64_t image = 0, oy = 0, ox = 0;  // the next output
  const auto place = [&] { return image * l.image_stride + oy * l.pitch + ox; };
  for (int64_t done = 0; done < total;) {
    PixelVector v{};
    v.offset = place();
    if (l.direct) v.offset = std::min(v.offset, l.limit - room);
    v.first_segment = static_cast<int32_t>(t.segments.size());
    const int64_t most = t.gather ? k.lanes : total;
    int64_t n = 0;
    for (; n < most && done + n < total; ++n) {
      const int64_t at = place() - v.offset;
      if (t.gather ? at > room : at >= k.lanes) break;
      const int64_t lane = t.gather ? n : at;
      v.lane[lane] = static_cast<int32_t>(at);
      if (v.segments == 0 || t.segments.back().image != image) {
        t.segments.push_back({image * out_image_stride + oy * plan.out_w + ox, 0, static_cast<int32_t>(image)});
        ++v.segments;
      }
      t.segments.back().lanes |= 1u << lane;
      if (++ox == plan.out_w) {
        ox = 0;
        if (++oy == plan.out_h) oy = 0, ++image;
      }
    }
    done += n;
    t.vectors.push_back(v);
  }
  for (int c = 0; c < 3; ++c) {
    const auto count = static_cast<int64_t>(t.vectors.size());
    const int64_t tiles = div_up(count, k.nr[c]);
    for (int64_t i = 0; i < tiles; ++i) {
      t.tiles[c].push_back({i * count / tiles, static_cast<int>((i + 1) * count / tiles - i * count / tiles)});
    }
  }
}

// How many images to cut together so that little of the last tile is wasted, as far as `most`; 1 where an image is many
// tiles.
template <class Cost>
int64_t choose_period(int64_t most, int64_t outputs, const Cost& cost) {
  int64_t period = 1;
  for (int64_t n = 2; n <= std::min(most, kMaxPeriod) && (n - 1) * outputs < 256; ++n) {
    if (cost(n) / static_cast<double>(n) < 0.97 * cost(period) / static_cast<double>(period)) period = n;
  }
  return period;
}

// Decides, block by block, between the kernels over pixels and over filters.
Plan make_plan(const Conv2dShape& s, const Packed& packed, Isa isa) {
  const PackedHeader& p = *packed.header;
  Plan plan;
  plan.kernels = &kernels::gemm_compact(isa);
  const GemmCompact& k = *plan.kernels;
  plan.out_h = s.out_h;
  plan.out_w = s.out_w;
  plan.outputs = plan.out_h * plan.out_w;

  // x can stay where it is if nothing surrounds it; vectors of pixels also want it without strides and no smaller than
  // they.
  const bool unpadded = s.padding[0] == 0 && s.padding[1] == 0 && s.x_strides[3] == 1;
  const bool direct = unpadded && s.stride[0] == 1 && s.stride[1] == 1 && (s.batch == 1 || plan.outputs >= 4 * k.lanes);
  plan.layout = make_layout(s, p, direct, true);
  if (direct && plan.layout.limit < 2 * k.lanes) {
    plan.layout = make_layout(s, p, false, true);
  }
  PixelTiles& px = plan.pixels;
  const auto vectors = [&](int64_t images, bool gather) {
    if (gather) return div_up(images * plan.outputs, k.lanes);
    return div_up((images - 1) * plan.layout.image_stride + (plan.out_h - 1) * plan.layout.pitch + plan.out_w, k.lanes);
  };
  double pixels_best = 0;
  for (const bool gather : {false, true}) {
    if (gather && (!k.gather || plan.out_w >= 4 * k.lanes)) continue;  // wide rows waste little, and a table is long
    const auto cost = [&](int64_t n) { return pixels_cost(k, 8, vectors(n, gather), gather); };
    const int64_t period = choose_period(plan.layout.direct ? 1 : plan.layout.chunk, plan.outputs, cost);
    const double best = cost(period) / static_cast<double>(period);
    if (gather && (best >= pixels_best || !gather_fits(plan, period))) continue;
    pixels_best = best;
    px.gather = gather;
    px.period = period;
  }
  FilterTiles& fl = plan.filters;
  const auto cost = [&](int64_t n) { return filters_cost(k, 0, 1, n * plan.outputs); };
  fl.period = choose_period(std::max<int64_t>(s.batch, 1), plan.outputs, cost);

  const double pieces = plan.outputs < k.lanes ? 1.25 : 1.0;  // a vector over several images is stored in pieces
  bool any_pixels = false;
  const auto count = static_cast<int64_t>(packed.panels.size());
  for (int64_t i = 0; i < count;) {
    const Panel& panel = packed.panels[i];
    const int c = kernels::width_class(panel.width);
    const int nv = next_panels(packed, i, k);
    const double by_filters = filters_cost(k, c, nv, fl.period * plan.outputs) / static_cast<double>(fl.period);
    const double by_pixels = pieces * nv * pixels_cost(k, panel.width, vectors(px.period, px.gather), px.gather) /
                             static_cast<double>(px.period);
    if (by_filters <= by_pixels) {
      plan.jobs.push_back({i, nv, 0});
      i += nv;
    } else {
      for (int first = 0; first < panel.filters; first += k.mr[c]) plan.jobs.push_back({i, 0, first});
      any_pixels = true;
      ++i;
    }
  }
  // Without vectors of pixels neither phases nor (unpadded) a copy are needed.
  if (!any_pixels && !plan.layout.direct && (unpadded || s.stride[0] != 1 || s.stride[1] != 1)) {
    plan.layout = make_layout(s, p, unpadded, false);
  }
  if (any_pixels) cut_vectors(plan, p.out_channels * plan.outputs, px);
  const Layout& l = plan.layout;
  // Offsets of several images must fit the 32 bits of the tables too.
  const int64_t span = std::max(std::abs(l.image_stride), p.out_channels * plan.outputs);
  fl.period = span > (1 << 26) ? 1 : std::min(fl.period, l.chunk);
  for (int64_t n = 0; n < fl.period; ++n) {
    for (int64_t oy = 0; oy < plan.out_h; ++oy) {
      for (int64_t ox = 0; ox < plan.out_w; ++ox) {
        fl.pixel.push_back(static_cast<int32_t>(n * l.image_stride + oy * l.h.step * l.pitch + ox * l.w.step));
        fl.out.push_back(static_cast<int32_t>((n * p.out_channels * plan.out_h + oy) * plan.out_w + ox));
      }
    }
  }
  return plan;
}

// Tiles of one job over `images` images.
int64_t job_units(const Plan& plan, const Packed& packed, const Job& job, int64_t images) {
  if (job.panels > 0) {
    return div_up(images, plan.filters.period) * div_up(plan.filters.period * plan.outputs, plan.kernels->pixels);
  }
  const int c = kernels::width_class(packed.panels[job.panel].width);
  return div_up(images, plan.pixels.period) * static_cast<int64_t>(plan.pixels.tiles[c].size());
}

void run_filters(const Plan& plan, const Packed& packed, const Job& job, const float* x, float* y, int64_t images,
                 int64_t begin, int64_t end) {
  const GemmCompact& k = *plan.kernels;
  const Panel& panel = packed.panels[job.panel];
  const Panel& last = packed.panels[job.panel + job.panels - 1];
  const int64_t image_out = packed.header->out_channels * plan.outputs;
  const int64_t tiles = div_up(plan.filters.period * plan.outputs, k.pixels);
  const auto& kernel = k.filters_kernel[kernels::width_class(panel.width)][job.panels - 1];
  FiltersArgs a{.x = nullptr,
                .channel_stride = plan.layout.channel_stride,
                .position_offset = plan.layout.position.data(),
                .taps = packed.taps + panel.first_tap,
                .n_taps = panel.n_taps,
                .w = packed.weights + panel.weight,
                .bias = packed.bias + panel.first_filter,
                .y = nullptr,
                .y_stride = plan.outputs,
                .filters = last.first_filter + last.filters - panel.first_filter,
                .pixel = nullptr,
                .out = nullptr};
  for (int64_t u = begin; u < end; ++u) {
    const int64_t image = u / tiles * plan.filters.period, first = u % tiles * k.pixels;
    const int64_t there = std::min(plan.filters.period, images - image) * plan.outputs;
    const int64_t n = std::min<int64_t>(k.pixels, there - first);
    if (n <= 0) continue;
    a.x = x + image * plan.layout.image_stride;
    a.y = y + image * image_out + panel.first_filter * plan.outputs;
    a.pixel = plan.filters.pixel.data() + first;
    a.out = plan.filters.out.data() + first;
    kernel[n - 1](a);
  }
}

void run_pixels(const Plan& plan, const Packed& packed, const Job& job, const float* x, float* y, int64_t images,
                int64_t begin, int64_t end) {
  const GemmCompact& k = *plan.kernels;
  const Panel& panel = packed.panels[job.panel];
  const int c = kernels::width_class(panel.width);
  const int64_t image_out = packed.header->out_channels * plan.outputs;
  const auto& tiles = plan.pixels.tiles[c];
  const auto& kernel = k.pixels_kernel[plan.pixels.gather][c];
  PixelsArgs a{.x = nullptr,
               .channel_stride = plan.layout.channel_stride,
               .position_offset = plan.layout.position.data(),
               .taps = packed.taps + panel.first_tap,
               .n_taps = panel.n_taps,
               .w = packed.weights + panel.weight + job.first,
               .w_stride = panel.width,
               .bias = packed.bias + panel.first_filter + job.first,
               .y = nullptr,
               .y_stride = plan.outputs,
               .filters = std::min(panel.filters - job.first, k.mr[c]),
               .vectors = nullptr,
               .segments = plan.pixels.segments.data(),
               .images = 0};
  for (int64_t u = begin; u < end; ++u) {
    const int64_t image = u / static_cast<int64_t>(tiles.size()) * plan.pixels.period;
    const Tile& tile = tiles[u % tiles.size()];
    a.images = static_cast<int>(std::min(plan.pixels.period, images - image));
    a.vectors = plan.pixels.vectors.data() + tile.first;
    if (a.segments[a.vectors->first_segment].image >= a.images) continue;
    a.x = x + image * plan.layout.image_stride;
    a.y = y + image * image_out + (panel.first_filter + job.first) * plan.outputs;
    kernel[tile.count - 1](a);
  }
}

// The padded copy of `images` images, channels that no tap reads left as they are.
void copy_padded(const Plan& plan, const Conv2dShape& s, const Packed& packed, const float* x, int64_t images,
                 float* to, Isa isa, Parallel& parallel, int64_t tasks) {
  const Layout& l = plan.layout;
  const auto copy = kernels::pad_copy(isa);
  const auto channels = static_cast<int64_t>(packed.channels.size());
  parallel.run(tasks, [&](int64_t task) {
    for (int64_t i = task * channels / tasks; i < (task + 1) * channels / tasks; ++i) {
      const int64_t channel = packed.channels[i];
      float* dst = to + channel * l.channel_stride;
      for (const auto& h : l.h.phases) {
        for (const auto& w : l.w.phases) {
          copy(PadCopyArgs{.src = x + channel * s.x_strides[1] + h.first * s.x_strides[2] + w.first * s.x_strides[3],
                           .image_stride = s.x_strides[0],
                           .row_stride = l.h.in_step * s.x_strides[2],
                           .col_stride = l.w.in_step * s.x_strides[3],
                           .dst = dst,
                           .images = images,
                           .image_rows = l.h.pitch,
                           .pitch = l.pitch,
                           .tail = l.h.tail * l.pitch + l.w.tail,
                           .lead_rows = h.lead,
                           .rows = h.count,
                           .lead_cols = w.lead,
                           .cols = w.count});
          dst += l.plane;
        }
      }
    }
  });
}

// The plan for a shape, kept by each calling thread: to make one costs as much as to convolve a small image.
const Plan& kept_plan(const Conv2dShape& s, const Packed& packed, Isa isa) {
  struct Entry {
    Conv2dShape shape;
    uint64_t structure;
    Isa isa;
    Plan plan;
  };
  constexpr size_t kEntries = 64;
  thread_local std::unique_ptr<Entry> entries[kEntries];
  const uint64_t structure = packed.header->structure;
  const uint64_t mix = structure ^ (static_cast<uint64_t>(s.batch) * 0x9e3779b97f4a7c15) ^
                       (static_cast<uint64_t>(s.height * s.width) * 0xc2b2ae3d27d4eb4f);
  // The tables of large maps are large, and cheap against the work: they share an entry.
  const bool large = s.out_h * s.out_w > (1 << 15);
  std::unique_ptr<Entry>& e = entries[large ? 0 : (mix ^ (mix >> 29)) % kEntries];
  if (!e || e->structure != structure || e->isa != isa || !(e->shape == s)) {
    e = nullptr;
    e = std::make_unique<Entry>(Entry{s, structure, isa, make_plan(s, packed, isa)});
  }
  return e->plan;
}

// Kept by each calling thread for its next call. Never shrinks: it holds kScratchFloats, or one image if that is more.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (floats > size) {
    buffer.reset();
    size = 0;
    // Huge pages: each tap reads another channel, hence another small page (measured: 2 to 10 % of a layer).
    constexpr size_t kPage = 2 << 20;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + kPage - 1) / kPage * kPage;
    buffer.reset(static_cast<float*>(std::aligned_alloc(kPage, bytes)));
    if (!buffer) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(buffer.get(), bytes, MADV_HUGEPAGE);
#endif
    size = static_cast<int64_t>(bytes / sizeof(float));
    std::fill_n(buffer.get(), size, 0.0f);
  }
  return buffer.get();
}

// The size of the output on an axis. Throws Error if there is none.
int64_t out_size(const char* op, int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  constexpr int64_t kMost = 1 << 28;
  SADMM_CHECK(stride >= 1 && stride < kMost, op, ": stride got ", stride, ", wanted at least 1");
  SADMM_CHECK(padding >= 0 && padding < kMost, op, ": padding got ", padding, ", wanted at least 0");
  SADMM_CHECK(dilation >= 1 && dilation < kMost, op, ": dilation got ", dilation, ", wanted at least 1");
  const int64_t reach = dilation * (kernel - 1) + 1;
  SADMM_CHECK(in + 2 * padding >= reach, op, ": x got size ", in, " with padding ", padding, ", wanted at least the ",
              reach, " that the kernel spans");
  return (in + 2 * padding - reach) / stride + 1;
}

}  // namespace

Conv2dShape conv2d_shape(const char* op, const TensorView& x, Device device, int64_t in_channels, int64_t kernel_h,
                         int64_t kernel_w, const Conv2dArgs& args) {
  SADMM_CHECK(x.dtype == Dtype::kF32, op, ": x got ", dtype_name(x.dtype), ", wanted f32");
  SADMM_CHECK(x.device == device, op, ": x got a tensor on another device, wanted that of the weight");
  SADMM_CHECK(x.dims == 4, op, ": x got shape ", x.shape(), ", wanted [batch, channels, height, width]");
  SADMM_CHECK(x.sizes[1] == in_channels, op, ": x has ", x.sizes[1], " channels, wanted ", in_channels);
  Conv2dShape s{};
  static_cast<Conv2dArgs&>(s) = args;
  s.batch = x.sizes[0];
  s.channels = x.sizes[1];
  s.height = x.sizes[2];
  s.width = x.sizes[3];
  std::copy_n(x.strides, 4, s.x_strides);
  constexpr int64_t kMost = 1 << 28;  // offsets within an image are 32 bits wide in the tables
  SADMM_CHECK(s.height < kMost && s.width < kMost && s.height * s.width < kMost, op, ": x got shape ", x.shape(),
              ", wanted fewer than 2^28 pixels");
  s.out_h = out_size(op, s.height, kernel_h, args.stride[0], args.padding[0], args.dilation[0]);
  s.out_w = out_size(op, s.width, kernel_w, args.stride[1], args.padding[1], args.dilation[1]);
  SADMM_CHECK(s.out_h < kMost && s.out_w < kMost && s.out_h * s.out_w < kMost, op, ": y would get ", s.out_h, " x ",
              s.out_w, " pixels, wanted fewer than 2^28");
  return s;
}

void conv2d_compact(const Conv2dShape& s, const float* x, const Packed& packed, float* y, Isa isa, Parallel& parallel) {
  if (s.batch == 0) return;
  const Plan& plan = kept_plan(s, packed, isa);
  const Layout& l = plan.layout;
  const int64_t image_out = packed.header->out_channels * plan.outputs;
  const int64_t step = l.direct ? s.batch : l.chunk;
  // Vectors reach behind the last plane, and behind the last image where some are absent.
  float* copy = l.direct ? nullptr : scratch(packed.header->in_channels * l.channel_stride + l.image_stride + 64);
  for (int64_t image = 0; image < s.batch; image += step) {
    const int64_t images = std::min(step, s.batch - image);
    const int64_t macs = packed.header->weights * plan.outputs * images;
    const int64_t tasks = macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
    const float* from = x + image * s.x_strides[0];
    if (!l.direct) {
      copy_padded(plan, s, packed, from, images, copy, isa, parallel, std::min<int64_t>(tasks, packed.channels.size()));
      from = copy;
    }
    // All panels over one strip of pixels before the next strip, so that what they read of x stays in L2.
    const int64_t read = images * s.height * s.width * static_cast<int64_t>(packed.channels.size());
    const int64_t strips = std::clamp<int64_t>(div_up(read, kStripFloats), 1, images * plan.outputs);
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
          (job.panels > 0 ? run_filters : run_pixels)(plan, packed, job, from, y + image * image_out, images, begin,
                                                      end);
        }
      }
    });
  }
}

std::vector<std::string> conv2d_kernels(const Conv2dShape& s, const Packed& packed, Isa isa) {
  const Plan plan = make_plan(s, packed, isa);
  const GemmCompact& k = *plan.kernels;
  std::vector<std::string> names;
  for (const Job& job : plan.jobs) {
    const int width = packed.panels[job.panel].width, c = kernels::width_class(width);
    int most = 0;
    for (const Tile& tile : plan.pixels.tiles[c]) most = std::max(most, tile.count);
    const std::string by = job.panels > 0
                               ? "filters_" + std::to_string(k.pixels) + "x" + std::to_string(job.panels * width)
                               : "pixels_" + std::to_string(k.mr[c]) + "x" + std::to_string(most * k.lanes) +
                                     (plan.pixels.gather ? "_gather" : "");
    names.push_back("gemm_compact_f32_" + by + "__" + k.isa);
  }
  return names;
}

}  // namespace structadmm
