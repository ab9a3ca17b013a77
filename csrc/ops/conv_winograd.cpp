// The family winograd: 3x3 convolutions of stride 1 with a quarter of the multiply-adds (kernels/winograd/winograd.h).
//
// Where AVX-512 has them x, y and the residual may be bf16: what lies between is f32, for bf16 would lose most of its
// bits in the transforms.
//
// A block of tiles at a time: the squares of all channels are transformed, then for some panels of filters the 36
// products run on the filters kernels of kernels/gemm_compact, and their sums are transformed back and stored. The
// weights are transformed once. Pruned taps are zeros here: a column that is missing saves nothing.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/div_up.h"
#include "base/scratch.h"
#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/winograd/winograd.h"
#include "kernels/winograd/winograd_points.h"
#include "ops/conv.h"
#include "ops/pixel_tiles.h"
#include "ops/spec_table.h"

namespace structadmm {
namespace {

using kernels::kMaxPanel;
using kernels::kWinogradPlaces;
using kernels::kWinogradSquare;

constexpr auto kOp = "conv_winograd";
constexpr int64_t kLine = 16;                       // floats
constexpr int64_t kBlockFloats = 96 * 1024;         // of transformed squares and sums, which stay in L2
constexpr int64_t kFewTiles = 16, kManyTiles = 48;  // in a block: fewer read the weights too often
constexpr int64_t kFarWeights = 128 * 1024;         // floats, with more of which they come from beyond L2
constexpr int64_t kSerialMacs = 1 << 20;            // without the taps: some 40 microseconds

// Some panels of filters, as many as one kernel takes.
struct Group {
  int64_t first_panel, panels, at;  // its weights begin at u[at]: [place][panel][channel][filter]
};

struct Weights {
  int64_t filters = 0;
  std::vector<int32_t> channels;                     // of x that some tap reads
  std::vector<float, LineAllocator<float>> u, bias;  // bias: zeros behind it for the width of a panel
  std::vector<Group> groups;
};

// G g G', g: [3][3].
void transform(const float* g, double (&u)[kWinogradSquare][kWinogradSquare]) {
  using kernels::points::kG;
  for (int i = 0; i < kWinogradSquare; ++i) {
    double row[3] = {};
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) row[b] += kG[i][a] * static_cast<double>(g[3 * a + b]);
    }
    for (int j = 0; j < kWinogradSquare; ++j) u[i][j] = kG[j][0] * row[0] + kG[j][1] * row[1] + kG[j][2] * row[2];
  }
}

Weights transformed(const ConvSpec& spec, const kernels::GemmCompact& k) {
  const PackedBytes bytes = pack(kOp, table_of(spec));
  const Packed packed = unpack(kOp, bytes);
  Weights w;
  w.filters = packed.header->out_channels;
  w.channels.assign(packed.channels.begin(), packed.channels.end());
  const auto channels = static_cast<int64_t>(w.channels.size());
  const int64_t panels = div_up(w.filters, int64_t{kMaxPanel}), groups = div_up(panels, int64_t{k.nv[0]});
  w.bias.assign(static_cast<size_t>(panels * kMaxPanel), 0.0f);
  std::copy_n(packed.bias, w.filters, w.bias.begin());

  std::vector<float> dense(static_cast<size_t>(w.filters * channels * 9), 0.0f);
  for (const Panel& p : packed.panels) {
    for (int64_t t = 0; t < p.n_taps; ++t) {
      const kernels::Tap& tap = packed.taps[p.first_tap + t];
      const int64_t c = std::lower_bound(w.channels.begin(), w.channels.end(), tap.channel) - w.channels.begin();
      for (int f = 0; f < p.filters; ++f) {
        dense[((p.first_filter + f) * channels + c) * 9 + tap.position] = packed.weights[p.weight + t * p.width + f];
      }
    }
  }
  const int64_t panel_floats = channels * kMaxPanel;
  w.u.assign(static_cast<size_t>(kWinogradPlaces * panels * panel_floats), 0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * panels / groups, count = (g + 1) * panels / groups - first;
    w.groups.push_back({first, count, kWinogradPlaces * first * panel_floats});
    // A line in each place is written at a time.
    for (int64_t i = 0; i < count * panel_floats; ++i) {
      const int64_t f = first * kMaxPanel + i / panel_floats * kMaxPanel + i % kMaxPanel;
      if (f >= w.filters) continue;
      double u[kWinogradSquare][kWinogradSquare];
      transform(dense.data() + (f * channels + i % panel_floats / kMaxPanel) * 9, u);
      float* const to = w.u.data() + w.groups.back().at + i;
      for (int64_t j = 0; j < kWinogradPlaces; ++j) {
        to[j * count * panel_floats] = static_cast<float>(u[j / kWinogradSquare][j % kWinogradSquare]);
      }
    }
  }
  return w;
}

class WinogradStep final : public Step {
 public:
  WinogradStep(std::shared_ptr<const Weights> weights, ConvPlanes planes, const Epilogue& epilogue, int64_t images,
               Isa isa)
      : w_(std::move(weights)),
        planes_(planes),
        epilogue_(epilogue),
        bf16_(planes.x.dtype == Dtype::kBf16),
        k_(kernels::gemm_compact(isa)),
        transforms_(kernels::winograd(isa)) {
    const auto channels = static_cast<int64_t>(w_->channels.size());
    const int64_t most =
        std::clamp(kBlockFloats / (kWinogradPlaces * (channels + k_.nv[0] * kMaxPanel)), kFewTiles, kManyTiles);
    const int64_t image = div_up(planes.y.height, int64_t{4}) * div_up(planes.y.width, int64_t{4});
    const int64_t period = std::clamp<int64_t>(most / std::max<int64_t>(image, 1), 1, std::max<int64_t>(images, 1));
    tiles_ = cut_squares(planes_, period, most, k_.lanes, transforms_.lanes);
    for (const auto& b : tiles_.blocks) most_ = std::max<int64_t>(most_, b.tiles);
    for (const Group& g : w_->groups) widest_ = std::max(widest_, g.panels * kMaxPanel);
    // Not a power of two apart: places would share few cache sets.
    in_place_ = channels * most_ + kLine;
    for (int64_t c = 0; c < channels; ++c) offset_.push_back(c * most_);
    out_place_ = most_ * widest_ + kLine;
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const void* const x = inputs[0];
    const auto* residual = epilogue_.residual ? static_cast<const float*>(inputs[1]) : nullptr;
    auto* y = static_cast<float*>(output);  // or what is bf16
    const auto groups = static_cast<int64_t>(w_->groups.size()), blocks = static_cast<int64_t>(tiles_.blocks.size());
    const int64_t all = div_up(images, tiles_.period) * blocks, units = all * groups;
    const int64_t macs = images * planes_.outputs() * w_->filters * static_cast<int64_t>(w_->channels.size());
    const bool serial = parallel.threads() == 1 || macs < kSerialMacs;
    const int64_t tasks =
        serial ? 1 : std::min(units, parallel.threads() * int64_t{all >= 8 * parallel.threads() ? 4 : 1});
    parallel.run(tasks, [&](int64_t task) {
      float* const v =
          scratch(kWinogradPlaces * (in_place_ + out_place_) + kernels::kMaxSpan * widest_, Scratch::kPanel);
      const int64_t end = (task + 1) * units / tasks;
      int64_t there = -1;
      for (int64_t u = task * units / tasks; u < end; ++u) {
        const int64_t image = u / groups / blocks * tiles_.period, left = images - image;
        const SquareTiles::Block& block = tiles_.blocks[u / groups % blocks];
        if (there != u / groups) transform_in(block, at(x, image * planes_.x.image_stride), left, v);
        there = u / groups;
        const Group& group = w_->groups[u % groups];
        multiply(block, group, v, v + kWinogradPlaces * in_place_);
        kernels::Output out{.y = at(y, image * planes_.y.image_stride),
                            .y_stride = planes_.y.channel_stride,
                            .residual = residual ? at(residual, image * planes_.residual.image_stride) : nullptr,
                            .residual_stride = planes_.residual.channel_stride,
                            .stores = tiles_.stores.data(),
                            .images = static_cast<int>(std::min(tiles_.period, left)),
                            .epilogue = epilogue_};
        transform_out(block, group, v + kWinogradPlaces * in_place_, out);
      }
    });
  }

  std::string kernel() const override {
    return std::string(bf16_ ? "winograd_bf16_4x4__" : "winograd_f32_4x4__") + transforms_.isa;
  }

 private:
  // So many elements of x, y or the residual from there on.
  template <class T>
  T* at(T* from, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + elements * dtype_size(planes_.x.dtype));
  }

  void transform_in(const SquareTiles::Block& block, const void* x, int64_t images, float* v) const {
    const Planes& p = planes_.x;
    const auto kernel = bf16_ ? transforms_.in_bf16 : transforms_.in;
    for (int64_t i = 0; i < block.runs; ++i) {
      const SquareTiles::Run& run = tiles_.runs[block.first_run + i];
      if (run.image >= images) break;
      kernel({.x = at(x, run.image * p.image_stride + p.origin),
              .channel = w_->channels.data(),
              .channels = static_cast<int64_t>(w_->channels.size()),
              .plane_stride = p.channel_stride,
              .pitch = p.pitch,
              .height = p.height,
              .width = p.width,
              .row = run.row - planes_.geometry.padding[0],
              .column = run.column - planes_.geometry.padding[1],
              .tiles = run.tiles,
              .v = v + run.first,
              .place_stride = in_place_,
              .channel_stride = most_});
    }
  }

  void multiply(const SquareTiles::Block& block, const Group& group, const float* v, float* m) const {
    alignas(64) static constexpr float kZeros[kMaxPanel * kernels::kMaxPanels] = {};
    const auto& kernel = k_.filters_kernel[0][group.panels - 1];
    const auto channels = static_cast<int64_t>(w_->channels.size()), floats = channels * kMaxPanel;
    const int64_t pieces = div_up(int64_t{block.tiles}, int64_t{k_.pixels[0][group.panels - 1]});
    int32_t pixel[kManyTiles];
    for (int32_t i = 0; i < block.tiles; ++i) pixel[i] = i;
    kernels::FiltersArgs a{.x = v,
                           .offset = offset_.data(),
                           .n_taps = channels,
                           .w = w_->u.data() + group.at,
                           .panel_stride = floats,
                           .start = kZeros,
                           .filters = static_cast<int>(group.panels * kMaxPanel),
                           .pixel = nullptr,
                           .row = nullptr,
                           .sums_stride = widest_,
                           .out = {}};
    const bool far = static_cast<int64_t>(w_->u.size()) > kFarWeights;
    for (int place = 0; place < kWinogradPlaces; ++place) {
      const float* next = a.w + group.panels * floats;  // the last place reads behind: the next group's, or nothing
      for (int64_t i = 0; i < pieces; ++i) {
        a.stream = far && i < group.panels && next < w_->u.data() + w_->u.size() ? next + i * floats : nullptr;
        const int64_t begin = i * block.tiles / pieces, n = (i + 1) * block.tiles / pieces - begin;
        a.pixel = pixel + begin;
        a.sums = m + begin * widest_;
        kernel[n - 1](a);
      }
      a.x += in_place_;
      a.w += group.panels * floats;
      m += out_place_;
    }
  }

  void transform_out(const SquareTiles::Block& block, const Group& group, float* m, const kernels::Output& out) const {
    float* const sums = m + kWinogradPlaces * out_place_;
    const int64_t first = group.first_panel * kMaxPanel;
    kernels::SpreadArgs to{.sums = sums,
                           .sums_stride = widest_,
                           .filters = static_cast<int>(std::min(w_->filters - first, group.panels * kMaxPanel)),
                           .vectors = 4,
                           .stores = nullptr,
                           .out = out};
    to.out.y = at(to.out.y, first * out.y_stride);
    if (out.residual) to.out.residual = at(to.out.residual, first * out.residual_stride);
    for (int64_t i = 0; i < block.groups; ++i) {
      const SquareTiles::Group& tiles = tiles_.groups[block.first_group + i];
      transforms_.out({.m = m + tiles.first * widest_,
                       .place_stride = out_place_,
                       .tile_stride = widest_,
                       .tiles = tiles.tiles,
                       .filters = static_cast<int>(group.panels * kMaxPanel),
                       .bias = w_->bias.data() + first,
                       .y = sums,
                       .row_stride = k_.lanes,
                       .pixel_stride = widest_});
      to.stores = tiles.rows;
      (bf16_ ? k_.spread_bf16 : k_.spread)(to);
    }
  }

  std::shared_ptr<const Weights> w_;
  ConvPlanes planes_;
  Epilogue epilogue_;
  bool bf16_;
  const kernels::GemmCompact& k_;
  const kernels::Winograd& transforms_;
  SquareTiles tiles_;
  int64_t most_ = 0, widest_ = 0;         // tiles of a block, filters of a group
  int64_t in_place_ = 0, out_place_ = 0;  // floats from place to place
  std::vector<int64_t> offset_;           // of each channel in a place
};

class WinogradConv final : public PackedConv {
 public:
  WinogradConv(const ConvSpec& spec, Isa isa)
      : geometry_{{1, 1}, {spec.padding[0], spec.padding[1]}, {1, 1}}, epilogue_(spec.epilogue), isa_(isa) {
    SADMM_CHECK(can_winograd(spec), kOp, ": got a kernel of ", spec.kernel[0], " x ", spec.kernel[1], ", strides ",
                spec.stride[0], " and ", spec.stride[1], ", dilations ", spec.dilation[0], " and ", spec.dilation[1],
                ", ", spec.groups, " groups, wanted 3 x 3 and ones");
    weights_ = std::make_shared<const Weights>(transformed(spec, kernels::gemm_compact(isa)));
    SADMM_CHECK(spec.out_channels == weights_->filters, kOp, ": out_channels got ", spec.out_channels, ", wanted the ",
                weights_->filters, " filters of the weight");
    in_channels_ = spec.in_channels;
  }

  const char* family() const override { return "winograd"; }
  bool takes_edges(int64_t batch, int64_t, int64_t) const override { return batch == 1; }
  int64_t weight_bytes() const override { return 4 * static_cast<int64_t>(weights_->u.size()); }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    SADMM_CHECK((residual != nullptr) == epilogue_.residual, kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted ", epilogue_.residual ? "planes" : "none");
    const ConvPlanes planes{.x = x, .y = y, .residual = residual ? *residual : y, .geometry = geometry_};
    const bool bf16 = x.dtype == Dtype::kBf16 && winograd_holds(Dtype::kBf16, isa_);
    check_planes(kOp, planes, in_channels_, weights_->filters, {3, 3}, bf16 ? Dtype::kBf16 : Dtype::kF32);
    return std::make_unique<WinogradStep>(weights_, planes, epilogue_, images, isa_);
  }

 private:
  ConvGeometry geometry_;
  Epilogue epilogue_;
  Isa isa_;
  int64_t in_channels_ = 0;
  std::shared_ptr<const Weights> weights_;
};

}  // namespace

bool can_winograd(const ConvSpec& s) {
  const auto are = [](const int64_t (&pair)[2], int64_t value) { return pair[0] == value && pair[1] == value; };
  return are(s.kernel, 3) && are(s.stride, 1) && are(s.dilation, 1) && s.groups == 1;
}

bool winograd_holds(Dtype dtype, Isa isa) {
  return dtype == Dtype::kF32 || (dtype == Dtype::kBf16 && kernels::winograd(isa).in_bf16);
}

bool winograd_pays(const ConvSpec& s, int64_t height, int64_t width, Dtype dtype, Isa isa) {
  if (!can_winograd(s) || !winograd_holds(dtype, isa) || height * width == 0) return false;
  if (dtype == Dtype::kBf16 && isa == Isa::kAmxBf16) return false;  // products of tiles are ten times those of f32
  // Cycles: of a multiply-add of vectors, of a run and channel on the way in, of a tile and a vector of filters on the
  // way out, of a vector of pixels and a panel that are stored; of a byte of weights from beyond L2. Measured on a CPU
  // with one unit of 512-bit multiply-adds, and rounded so that one with two is served too.
  constexpr double kMultiplyAdd = 0.6, kIn = 250, kOut = 150, kStore = 300, kByte = 0.1, kL2 = 1 << 20;
  const auto& t = kernels::winograd(isa);
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  const int64_t rows = div_up(height, int64_t{4}), wide = div_up(width, int64_t{4}), tiles = rows * wide;
  const int64_t panels = div_up(s.out_channels, int64_t{kMaxPanel}), per_group = kernels::gemm_compact(isa).lanes / 4;
  const int64_t groups = wide < per_group ? div_up(tiles, per_group) : rows * div_up(wide, per_group);
  const double vectors = number(panels * kMaxPanel) / t.lanes, channels = number(s.in_channels);
  const double products = kMultiplyAdd * kWinogradPlaces * number(std::max<int64_t>(tiles, 2)) * channels * vectors;
  const double transforms = kIn * number(rows * div_up(wide, int64_t{t.lanes})) * channels +
                            kOut * number(tiles) * vectors + kStore * number(4 * groups * panels);
  const double bytes = 4 * kWinogradPlaces * channels * number(panels * kMaxPanel);
  const double winograd = products + transforms + kByte * std::max(0.0, bytes - kL2);
  const double taps = kMultiplyAdd * number(height * width) * number(static_cast<int64_t>(s.weight.size())) / t.lanes;
  if (dtype != Dtype::kBf16 || isa != Isa::kAvx512Bf16) return winograd < 0.9 * taps;
  // Of two taps of 32 pixels that are gathered, for however few filters. With it the two are estimated closely.
  constexpr double kGather = 6;
  const double gather = kGather * number(height * width) / 32 * number(std::ssize(s.taps)) / 2;
  return winograd < 0.95 * (taps / 2 + gather);
}

std::shared_ptr<const PackedConv> pack_conv_winograd(const ConvSpec& spec, Isa isa) {
  return std::make_shared<WinogradConv>(spec, isa);
}

}  // namespace structadmm
