// Compacted convolution in bf16 on planes: the weight in tiles, and how its work is cut.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/div_up.h"
#include "kernels/gemm_bf16/gemm_bf16.h"
#include "ops/conv.h"
#include "ops/merge_blocks.h"
#include "ops/panel_tables.h"
#include "ops/spec_table.h"
#include "ops/tap_table.h"

namespace structadmm {
namespace {

using kernels::GemmBf16;
using kernels::GemmBf16Args;
using kernels::GemmBf16Block;
using kernels::kStepTaps;
using kernels::kTile;
using kernels::WeightLayout;

constexpr auto kOp = "conv_taps_bf16";
constexpr int kUnit = 2 * kTile, kPairPixels = 2 * kTile;

// Below this many multiply-adds other threads are not worth waking.
// Ten to twenty microseconds on tiles: with less, what one core wrote costs the other more to fetch than it saves
// (measured: ResNet-18/CIFAR at a density of 0.1 and batch 1 took 1.6 times as long on two threads).
constexpr int64_t kSerialMacs = 8 << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<std::byte, Free>;

Bytes allocate(int64_t bytes) {
  constexpr int64_t kLine = 64;
  Bytes p(static_cast<std::byte*>(std::aligned_alloc(kLine, div_up(std::max<int64_t>(bytes, 1), kLine) * kLine)));
  if (!p) throw std::bad_alloc();
  std::memset(p.get(), 0, bytes);
  return p;
}

// Kept by each thread for its next task.
std::byte* scratch(int64_t bytes) {
  thread_local Bytes buffer;
  thread_local int64_t size = 0;
  if (bytes > size) {
    buffer = allocate(bytes);
    size = bytes;
  }
  return buffer.get();
}

uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Block {
  int64_t first_filter, filters, first_tap, taps, steps;
  int32_t first_unit;
  int64_t weight;  // byte offset
  int64_t bias;    // index
};

struct TapPlace {
  int32_t channel, y, x;  // absolute channel, kernel row and column
};

// What all plans share.
struct Weights {
  ConvSpec spec;  // without weight and taps
  const GemmBf16* kernel = nullptr;
  std::vector<Block> blocks;
  std::vector<TapPlace> taps;
  std::vector<float> bias;
  Bytes packed;
  int32_t units = 0;
  int64_t most_steps = 0, macs = 0;  // multiply-adds of an output pixel

  bool tiles() const { return kernel->layout == WeightLayout::kTiles; }
};

std::shared_ptr<const Weights> pack_weights(const ConvSpec& given, Isa isa) {
  const TapTable t = table_of(given);
  check(kOp, t);
  int64_t filters = 0;
  for (const int32_t n : given.block_filters) filters += n;
  SADMM_CHECK(filters == given.out_channels, kOp, ": block_filters got ", filters, " filters in all, wanted ",
              given.out_channels);
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(given.stride[i] >= 1, kOp, ": stride got ", given.stride[i], ", wanted at least 1");
    SADMM_CHECK(given.dilation[i] >= 1, kOp, ": dilation got ", given.dilation[i], ", wanted at least 1");
    SADMM_CHECK(given.padding[i] >= 0, kOp, ": padding got ", given.padding[i], ", wanted at least 0");
  }

  isa_supported(isa);  // for the permission to use tiles, where nobody has asked yet

  auto w = std::make_shared<Weights>();
  w->kernel = &kernels::gemm_bf16(isa);
  // Cycles of the AMX kernel, measured on planes in L2.
  constexpr BlockCosts kAmx{.panel = 60, .product = 35, .unit = 120};
  const ConvSpec spec = isa == Isa::kAmxBf16 ? merge_blocks(given, kAmx) : given;
  w->spec = spec;
  for (auto* v : {&w->spec.weight, &w->spec.bias}) *v = {};
  for (auto* v : {&w->spec.taps, &w->spec.block_filters, &w->spec.block_taps}) *v = {};
  const bool tiles = w->tiles();
  const int64_t positions = spec.kernel[0] * spec.kernel[1], per_group = filters / spec.groups;
  const int64_t group_channels = spec.in_channels / spec.groups;
  int64_t filter = 0, bytes = 0, bias = 0;
  for (size_t b = 0; b < spec.block_filters.size(); ++b) {
    const int64_t n = spec.block_filters[b], first = spec.block_taps[b], count = spec.block_taps[b + 1] - first;
    w->blocks.push_back({filter, n, first, count, div_up(count, kStepTaps), w->units, bytes, bias});
    const Block& block = w->blocks.back();
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t position = spec.taps[i] % positions;
      w->taps.push_back({static_cast<int32_t>(filter / per_group * group_channels + spec.taps[i] / positions),
                         static_cast<int32_t>(position / spec.kernel[1]),
                         static_cast<int32_t>(position % spec.kernel[1])});
    }
    w->units += static_cast<int32_t>(div_up(n, kUnit));
    w->most_steps = std::max(w->most_steps, block.steps);
    w->macs += n * count;
    bytes += div_up(n, kTile) * kTile * block.steps * kStepTaps * (tiles ? sizeof(Bf16) : sizeof(float));
    bias += div_up(n, kUnit) * kUnit;
    filter += n;
  }
  w->bias.assign(bias, 0.0f);
  w->packed = allocate(bytes);
  const float* from = spec.weight.data();
  for (const Block& b : w->blocks) {
    if (!spec.bias.empty()) std::copy_n(spec.bias.data() + b.first_filter, b.filters, w->bias.data() + b.bias);
    std::byte* to = w->packed.get() + b.weight;
    for (int64_t f = 0; f < b.filters; ++f) {
      const int64_t unit = f / kUnit, in_unit = div_up(std::min<int64_t>(b.filters - unit * kUnit, kUnit), kTile);
      for (int64_t k = 0; k < b.taps; ++k) {
        const uint16_t value = to_bf16(from[f * b.taps + k]);
        if (tiles) {
          const int64_t tile = unit * 2 * b.steps + k / kStepTaps * in_unit + f % kUnit / kTile;
          reinterpret_cast<uint16_t*>(to)[(tile * kTile + f % kTile) * kStepTaps + k % kStepTaps] = value;
        } else {
          const uint32_t bits = static_cast<uint32_t>(value) << 16;
          std::memcpy(to + ((f / kTile * b.steps * kStepTaps + k) * kTile + f % kTile) * sizeof(float), &bits,
                      sizeof bits);
        }
      }
    }
    from += b.filters * b.taps;
  }
  return w;
}

class TapsStep final : public Step {
 public:
  TapsStep(std::shared_ptr<const Weights> weights, const Planes& x, const Planes& y, const Planes* residual,
           int64_t images)
      : weights_(std::move(weights)) {
    const ConvSpec& s = weights_->spec;
    int64_t furthest = 0, nearest = weights_->taps.empty() ? 0 : std::numeric_limits<int64_t>::max();
    std::vector<int32_t> offset(weights_->taps.size());
    for (size_t i = 0; i < offset.size(); ++i) {
      const TapPlace& t = weights_->taps[i];
      const int64_t at = t.channel * x.channel_stride + t.y * s.dilation[0] * x.pitch + t.x * s.dilation[1];
      offset[i] = static_cast<int32_t>(at);
      furthest = std::max(furthest, at);
      nearest = std::min(nearest, at);
    }
    tables_ = make_panel_tables(s, {x, y, residual, images, nearest, furthest, weights_->tiles()});
    for (const Block& b : weights_->blocks) {
      for (int64_t k = 0; k < b.steps * kStepTaps; ++k) {
        const int64_t tap = b.first_tap + std::min(k, b.taps - 1);
        offset_.push_back(offset[tap]);
        position_.push_back(static_cast<int32_t>(weights_->taps[tap].y * s.kernel[1] + weights_->taps[tap].x));
      }
    }
    int64_t at = 0;
    for (const Block& b : weights_->blocks) {
      blocks_.push_back({.first_filter = b.first_filter,
                         .filters = static_cast<int32_t>(b.filters),
                         .taps = static_cast<int32_t>(b.taps),
                         .steps = static_cast<int32_t>(b.steps),
                         .first_unit = b.first_unit,
                         .offset = offset_.data() + at,
                         .position = position_.data() + at,
                         .w = weights_->packed.get() + b.weight,
                         .bias = weights_->bias.data() + b.bias});
      at += b.steps * kStepTaps;
    }
    args_ = {.x = nullptr,
             .y = nullptr,
             .x_f32 = x.dtype == Dtype::kF32,
             .y_f32 = y.dtype == Dtype::kF32,
             .residual = nullptr,
             .y_channel_stride = y.channel_stride,
             .residual_channel_stride = residual ? residual->channel_stride : 0,
             .x_period_stride = tables_.period * x.image_stride,
             .y_period_stride = tables_.period * y.image_stride,
             .residual_period_stride = residual ? tables_.period * residual->image_stride : 0,
             .pairs_per_period = static_cast<int64_t>(tables_.pairs.size()),
             .period = static_cast<int32_t>(tables_.period),
             .images = 0,
             .pairs = tables_.pairs.data(),
             .vectors = tables_.vectors.data(),
             .inside = tables_.inside.data(),
             .positions = tables_.inside.empty() ? 0 : static_cast<int32_t>(s.kernel[0] * s.kernel[1]),
             .windows = tables_.windows.data(),
             .residual_windows = tables_.residual_windows.data(),
             .blocks = blocks_.data(),
             .n_blocks = static_cast<int64_t>(blocks_.size()),
             .first_pair = 0,
             .last_pair = 0,
             .first_unit = 0,
             .last_unit = weights_->units,
             .strip = strip_of(y, images, *weights_),
             .epilogue = s.epilogue,
             .scratch = nullptr};
    outputs_ = y.height * y.width;
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    GemmBf16Args all = args_;
    all.x = inputs[0];
    all.y = output;
    if (weights_->spec.epilogue.residual) all.residual = static_cast<const Bf16*>(inputs[1]);
    all.images = static_cast<int32_t>(images);
    const int64_t rest = images % tables_.period;
    const int64_t pairs =
        images / tables_.period * all.pairs_per_period +
        (std::lower_bound(tables_.first_image.begin(), tables_.first_image.end(), rest) - tables_.first_image.begin());
    const int64_t macs = weights_->macs * outputs_ * images;
    const int64_t tasks = macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
    const int64_t by_pixels = std::min(tasks, pairs);
    const int64_t by_filters = by_pixels ? std::min<int64_t>(div_up(tasks, by_pixels), weights_->units) : 0;
    parallel.run(by_pixels * by_filters, [&](int64_t task) {
      GemmBf16Args a = all;
      const int64_t p = task / by_filters, f = task % by_filters;
      a.first_pair = p * pairs / by_pixels;
      a.last_pair = (p + 1) * pairs / by_pixels;
      a.first_unit = static_cast<int32_t>(f * weights_->units / by_filters);
      a.last_unit = static_cast<int32_t>((f + 1) * weights_->units / by_filters);
      a.scratch = scratch(kernels::gemm_bf16_scratch(weights_->most_steps, a.strip));
      weights_->kernel->run(a);
    });
  }

  std::string kernel() const override { return weights_->kernel->name; }

 private:
  // Where y comes from beyond L2, a long run to one channel after the other (measured: 1.1 to 1.7 times as fast as
  // single pairs), of panels that leave most of L2 to the rest. The same where weights do. Where neither does, panels
  // stay in the first cache.
  static int32_t strip_of(const Planes& y, int64_t images, const Weights& w) {
    constexpr int64_t kSpills = 1 << 20, kPanels = 256 << 10, kOfBlocks = 4;
    const bool spills = images * y.channels * y.height * y.width * dtype_size(y.dtype) >= kSpills;
    const bool far = w.kernel->near_weights > 0 && w.units * w.most_steps * kStepTaps * kUnit > w.kernel->near_weights;
    if (!spills && !far) return w.blocks.size() > 1 ? kOfBlocks : 1;
    const int64_t panel =
        std::max<int64_t>(1, w.most_steps) * kStepTaps * kPairPixels * static_cast<int64_t>(sizeof(Bf16));
    return static_cast<int32_t>(std::clamp<int64_t>(kPanels / panel, 1, kernels::kMostStrip));
  }

  std::shared_ptr<const Weights> weights_;
  PanelTables tables_;
  std::vector<int32_t> offset_, position_;
  std::vector<GemmBf16Block> blocks_;
  GemmBf16Args args_{};
  int64_t outputs_ = 0;
};

class PackedTaps final : public PackedConv {
 public:
  PackedTaps(const ConvSpec& spec, Isa isa) : weights_(pack_weights(spec, isa)) {}

  const char* family() const override { return "taps_bf16"; }

  // Taps are counted in the blocks as merged. Where the map keeps its size, so that rows of x are rows of outputs. Each
  // block rounds what it reads, a cycle or two for 32 pixels of a tap; an import writes each channel once, at ten.
  bool takes_f32(int64_t height, int64_t width) const override {
    constexpr int64_t kPositions = 64, kTapsOfChannel = 5;
    const ConvSpec& s = weights_->spec;
    const bool same =
        s.stride[0] == 1 && s.stride[1] == 1 && s.out_size(0, height) == height && s.out_size(1, width) == width;
    const auto taps = static_cast<int64_t>(weights_->taps.size());
    return weights_->tiles() && same && s.kernel[0] * s.kernel[1] <= kPositions &&
           taps <= kTapsOfChannel * s.in_channels;
  }
  bool gives_f32() const override { return true; }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    const ConvSpec& s = weights_->spec;
    const bool caller = x.dtype == Dtype::kF32 && takes_f32(x.height, x.width);
    SADMM_CHECK((caller || x.dtype == Dtype::kBf16) && (y.dtype == Dtype::kBf16 || y.dtype == Dtype::kF32) &&
                    (!residual || residual->dtype == Dtype::kBf16),
                kOp, ": planes got another dtype, wanted bf16");
    SADMM_CHECK(!caller || (x.halo == Halo{} && x.pitch == x.width), kOp,
                ": x of f32 got a halo or gaps between its rows, wanted none");
    SADMM_CHECK(x.channels == s.in_channels, kOp, ": x has ", x.channels, " channels, wanted ", s.in_channels);
    SADMM_CHECK(images >= 1, kOp, ": images got ", images, ", wanted at least 1");
    SADMM_CHECK((residual != nullptr) == s.epilogue.residual, kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted ", s.epilogue.residual ? "planes" : "none");
    SADMM_CHECK(y.channels == s.out_channels && y.height == s.out_size(0, x.height) &&
                    y.width == s.out_size(1, x.width) && y.height >= 1 && y.width >= 1,
                kOp, ": y got [", y.channels, ", ", y.height, ", ", y.width, "], wanted [", s.out_channels, ", ",
                s.out_size(0, x.height), ", ", s.out_size(1, x.width), "]");
    SADMM_CHECK(
        !residual || (residual->channels == y.channels && residual->height == y.height && residual->width == y.width),
        kOp, ": residual got [", residual->channels, ", ", residual->height, ", ", residual->width,
        "], wanted y's sizes");
    const auto reach = [&](int axis, int64_t out, int64_t in) {
      return (out - 1) * s.stride[axis] + (s.kernel[axis] - 1) * s.dilation[axis] - s.padding[axis] - (in - 1);
    };
    SADMM_CHECK(caller || (x.halo.top >= s.padding[0] && x.halo.left >= s.padding[1] &&
                           x.halo.bottom >= reach(0, y.height, x.height) && x.halo.right >= reach(1, y.width, x.width)),
                kOp, ": x got a halo of ", x.halo.top, ", ", x.halo.left, ", ", x.halo.bottom, ", ", x.halo.right,
                ", wanted what the kernel reads");
    // Offsets in the tables are 32 bits wide.
    SADMM_CHECK(x.readable < (int64_t{1} << 31), kOp, ": x got planes of ", x.readable,
                " elements, wanted fewer than 2^31");
    return std::make_unique<TapsStep>(weights_, x, y, residual, images);
  }

 private:
  std::shared_ptr<const Weights> weights_;
};

}  // namespace

std::shared_ptr<const PackedConv> pack_conv_taps_bf16(const ConvSpec& spec, Isa isa) {
  return std::make_shared<PackedTaps>(spec, isa);
}

}  // namespace structadmm
