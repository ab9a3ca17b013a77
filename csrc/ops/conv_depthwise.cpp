// Depthwise convolution: one input channel per conv group, a task per range of planes.
#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/depthwise/depthwise.h"
#include "ops/conv.h"
#include "ops/spec_table.h"
#include "ops/split.h"
#include "simd/vec_scalar.h"

namespace structadmm {
namespace {

constexpr const char* kOp = "depthwise";
constexpr int64_t kSerialMacs = 1 << 18;
constexpr int64_t kLoaded = 16;  // outputs of a row are loaded in multiples of this, whatever the instruction set

struct Filter {
  int64_t first_tap, n_taps, weight;
  bool square;  // all taps of a kernel that the kernels `square` know
};

struct PackedData {
  ConvSpec spec;  // without weight and taps
  Dtype dtype;
  Isa isa;
  const kernels::Depthwise& kernels;
  std::vector<float> weights;
  std::vector<int32_t> taps;  // flat kernel positions
  std::vector<Filter> filters;
};

struct Grid {
  std::vector<kernels::DepthwiseVector> vectors;
  std::vector<kernels::DepthwiseSegment> segments;
};

void check_planes(const char* name, const Planes& p, Dtype dtype, int64_t channels, int64_t height, int64_t width) {
  SADMM_CHECK(p.dtype == dtype, kOp, ": ", name, " got ", dtype_name(p.dtype), ", wanted ", dtype_name(dtype));
  SADMM_CHECK(p.channels == channels && p.height == height && p.width == width, kOp, ": ", name, " got planes of [",
              p.channels, ", ", p.height, ", ", p.width, "], wanted [", channels, ", ", height, ", ", width, "]");
}

class DepthwiseStep final : public Step {
 public:
  DepthwiseStep(std::shared_ptr<const PackedData> p, const Planes& x, const Planes& y, const Planes* residual,
                int64_t images)
      : p_(std::move(p)), x_(x), y_(y), square_(narrow() ? kernels::depthwise(Isa::kAvx2) : p_->kernels) {
    if (residual) residual_ = *residual;
    const ConvSpec& s = p_->spec;
    for (const int32_t position : p_->taps) {
      offsets_.push_back(position / s.kernel[1] * s.dilation[0] * x.pitch + position % s.kernel[1] * s.dilation[1]);
    }
    const int64_t reach = (s.kernel[0] - 1) * s.dilation[0] * x.pitch + (s.kernel[1] - 1) * s.dilation[1];
    const int64_t row = (y.width + kLoaded - 1) / kLoaded * kLoaded * s.stride[1];
    const int64_t last_row = x.at(images - 1, x.channels - 1, (y.height - 1) * s.stride[0], 0) - start();
    // `flat` vectors begin before the last output, too.
    const int64_t read = last_row + reach + std::max(row, y.width + kLoaded);
    exact_ = read > x.readable;
    const int64_t lanes = p_->kernels.lanes, by_rows = y.height * ((y.width + lanes - 1) / lanes);
    const int64_t flat = ((y.height - 1) * x.pitch + y.width + lanes - 1) / lanes;
    if (!exact_ && s.stride[0] == 1 && s.stride[1] == 1 && y.width <= x.pitch && flat < by_rows) {
      make_flat(flat);
    } else {
      make_rows();
    }
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const ConvSpec& s = p_->spec;
    const int64_t units = images * s.out_channels, multiplier = s.out_channels / s.in_channels;
    const int64_t macs = images * static_cast<int64_t>(p_->weights.size()) * y_.height * y_.width;
    split(parallel, units, macs, kSerialMacs, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t f = u / images, n = u % images;
        if (p_->dtype == Dtype::kF32) {
          run_plane<float>(inputs, output, f, n, multiplier);
        } else {
          run_plane<Bf16>(inputs, output, f, n, multiplier);
        }
      }
    });
  }

  std::string kernel() const override {
    const char* how = exact_ ? "exact" : uses_square(p_->filters[0]) ? "square" : flat_ ? "listed_flat" : "listed";
    return std::string("depthwise_") + how + "_" + dtype_name(p_->dtype) + "__" +
           (uses_square(p_->filters[0]) ? square_ : p_->kernels).isa;
  }

 private:
  // In narrow rows half of a wide vector is wasted, and its loads cross twice as many cache lines. (Without masks for
  // two bytes, AVX2 stores a part of a vector of bf16 slowly.)
  bool narrow() const { return p_->isa >= Isa::kAvx512 && p_->dtype == Dtype::kF32 && y_.width <= 8; }
  int64_t start() const { return p_->spec.padding[0] * x_.pitch + p_->spec.padding[1]; }
  bool uses_square(const Filter& f) const { return f.square && !exact_; }

  void make_rows() {
    const ConvSpec& s = p_->spec;
    const int64_t lanes = p_->kernels.lanes;
    for (int64_t oy = 0; oy < y_.height; ++oy) {
      for (int64_t ox = 0; ox < y_.width; ox += lanes) {
        grid_.vectors.push_back(
            {oy * s.stride[0] * x_.pitch + ox * s.stride[1], static_cast<int32_t>(grid_.segments.size()), 1});
        grid_.segments.push_back(
            {oy * y_.pitch + ox, oy * residual_.pitch + ox, 0, static_cast<int32_t>(std::min(lanes, y_.width - ox))});
      }
    }
  }

  // Vector v holds what would be outputs v * lanes and so on if rows of outputs were as far apart as those of x.
  void make_flat(int64_t vectors) {
    flat_ = true;
    const int64_t lanes = p_->kernels.lanes;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t begin = v * lanes;
      const auto first = static_cast<int32_t>(grid_.segments.size());
      for (int64_t oy = begin / x_.pitch; oy < y_.height && oy * x_.pitch < begin + lanes; ++oy) {
        const int64_t lead = oy * x_.pitch - begin;  // of the row before lane 0, or behind it
        const int64_t from = std::max<int64_t>(lead, 0), to = std::min(lanes, lead + y_.width);
        if (from >= to) continue;
        grid_.segments.push_back(
            {oy * y_.pitch - lead, oy * residual_.pitch - lead, static_cast<int32_t>(from), static_cast<int32_t>(to)});
      }
      const auto count = static_cast<int32_t>(grid_.segments.size()) - first;
      if (count) grid_.vectors.push_back({begin, first, count});
    }
  }

  template <class T>
  void run_plane(std::span<const void* const> inputs, void* output, int64_t f, int64_t n, int64_t multiplier) const {
    const ConvSpec& s = p_->spec;
    const Filter& filter = p_->filters[static_cast<size_t>(f)];
    const kernels::DepthwiseArgs a{
        .x = static_cast<const T*>(inputs[0]) + x_.at(n, f / multiplier, 0, 0) - start(),
        .y = static_cast<T*>(output) + y_.at(n, f, 0, 0),
        .residual = s.epilogue.residual ? static_cast<const T*>(inputs[1]) + residual_.at(n, f, 0, 0) : nullptr,
        .w = p_->weights.data() + filter.weight,
        .bias = s.bias.empty() ? 0.0f : s.bias[static_cast<size_t>(f)],
        .epilogue = s.epilogue,
        .stride = s.stride[1],
        .out_height = y_.height,
        .out_width = y_.width,
        .x_pitch = x_.pitch,
        .y_pitch = y_.pitch,
        .residual_pitch = residual_.pitch,
        .offsets = offsets_.data() + filter.first_tap,
        .n_taps = filter.n_taps,
        .n_vectors = static_cast<int64_t>(grid_.vectors.size()),
        .vectors = grid_.vectors.data(),
        .segments = grid_.segments.data(),
    };
    const int dtype = p_->dtype == Dtype::kF32 ? 0 : 1;
    if (uses_square(filter)) {
      square_.square[dtype][(s.kernel[0] - 3) / 2][s.stride[0] - 1](a);
    } else {
      (exact_ ? p_->kernels.exact : p_->kernels.listed)[dtype](a);
    }
  }

  std::shared_ptr<const PackedData> p_;
  Planes x_, y_, residual_;
  const kernels::Depthwise& square_;
  std::vector<int64_t> offsets_;
  Grid grid_;
  bool exact_ = false, flat_ = false;
};

class PackedDepthwise final : public PackedConv {
 public:
  explicit PackedDepthwise(std::shared_ptr<const PackedData> data) : data_(std::move(data)) {}
  const char* family() const override { return "depthwise"; }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    const ConvSpec& s = data_->spec;
    const int64_t height = s.out_size(0, x.height), width = s.out_size(1, x.width);
    check_planes("x", x, data_->dtype, s.in_channels, x.height, x.width);
    check_planes("y", y, data_->dtype, s.out_channels, height, width);
    SADMM_CHECK(height >= 1 && width >= 1, kOp, ": x got ", x.height, " x ", x.width,
                ", wanted at least the size of the kernel");
    SADMM_CHECK(s.epilogue.residual == (residual != nullptr), kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted what the epilogue says");
    if (residual) check_planes("residual", *residual, data_->dtype, s.out_channels, height, width);
    const auto behind = [&](int axis, int64_t in, int64_t out) {
      return (out - 1) * s.stride[axis] - s.padding[axis] + (s.kernel[axis] - 1) * s.dilation[axis] - (in - 1);
    };
    SADMM_CHECK(x.halo.top >= s.padding[0] && x.halo.left >= s.padding[1] &&
                    x.halo.bottom >= behind(0, x.height, height) && x.halo.right >= behind(1, x.width, width),
                kOp, ": x got a halo narrower than the padding ", s.padding[0], ", ", s.padding[1]);
    return std::make_unique<DepthwiseStep>(data_, x, y, residual, images);
  }

 private:
  std::shared_ptr<const PackedData> data_;
};

}  // namespace

std::shared_ptr<const PackedConv> pack_conv_depthwise(const ConvSpec& spec, Dtype dtype, Isa isa) {
  SADMM_CHECK(dtype == Dtype::kF32 || dtype == Dtype::kBf16, kOp, ": dtype got ", dtype_name(dtype),
              ", wanted f32 or bf16");
  SADMM_CHECK(spec.groups == spec.in_channels, kOp, ": groups got ", spec.groups, ", wanted one per channel, ",
              spec.in_channels);
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(spec.stride[i] >= 1 && spec.dilation[i] >= 1 && spec.padding[i] >= 0, kOp,
                ": stride, dilation and padding got ", spec.stride[i], ", ", spec.dilation[i], " and ", spec.padding[i],
                ", wanted positive ones, a padding of at least 0");
  }
  check(kOp, table_of(spec));

  auto p =
      std::make_shared<PackedData>(PackedData{spec, dtype, isa, kernels::depthwise(isa), spec.weight, spec.taps, {}});
  p->spec.weight.clear();
  p->spec.taps.clear();
  const bool known = spec.kernel[0] == spec.kernel[1] && spec.stride[0] == spec.stride[1] && spec.stride[0] <= 2 &&
                     spec.dilation[0] == 1 && spec.dilation[1] == 1 &&
                     (spec.kernel[0] == 3 || spec.kernel[0] == 5 || spec.kernel[0] == 7);
  int64_t weight = 0;
  for (size_t b = 0; b < spec.block_filters.size(); ++b) {
    const int64_t first = spec.block_taps[b], n = spec.block_taps[b + 1] - first;
    for (int32_t f = 0; f < spec.block_filters[b]; ++f, weight += n) {
      p->filters.push_back({first, n, weight, known && n == spec.kernel[0] * spec.kernel[1]});
    }
  }
  SADMM_CHECK(static_cast<int64_t>(p->filters.size()) == spec.out_channels, kOp, ": block_filters got ",
              p->filters.size(), " filters in all, wanted ", spec.out_channels);
  if (dtype == Dtype::kBf16) {
    for (float& w : p->weights) {
      Bf16 rounded;
      scalar::from_float(w, rounded);
      w = scalar::to_float(rounded);
    }
  }
  return std::make_shared<PackedDepthwise>(std::move(p));
}

}  // namespace structadmm
