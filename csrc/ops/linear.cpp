// Linear layers on rows of features: f32 by the kernels of gemm_compact, bf16 by those of linear_bf16.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/linear_bf16/linear_bf16.h"
#include "ops/spec_table.h"
#include "ops/split.h"
#include "ops/steps.h"
#include "simd/vec_scalar.h"

namespace structadmm {
namespace {

constexpr const char* kOp = "linear";
// Ten microseconds of work; reading a weight takes as long as using it four times.
constexpr int64_t kSerialMacs = 1 << 19, kReading = 4;

void check_rows(const char* name, const Planes& p, Dtype dtype, int64_t features) {
  SADMM_CHECK(p.dtype == dtype, kOp, ": ", name, " got ", dtype_name(p.dtype), ", wanted ", dtype_name(dtype));
  SADMM_CHECK(p.channels == features && p.height == 1 && p.width == 1 && p.channel_stride == 1, kOp, ": ", name,
              " got planes of [", p.channels, ", ", p.height, ", ", p.width, "], wanted rows of ", features,
              " features");
  constexpr int64_t kMost = 1 << 27;  // the offsets of the rows of a tile are 32 bits wide
  SADMM_CHECK(p.image_stride >= 0 && p.image_stride <= kMost, kOp, ": ", name, " got rows ", p.image_stride,
              " apart, wanted at most ", kMost);
}

// What the two dtypes have in common: the planes, and a grid of jobs (filters that go together) by tiles of rows.
class LinearStep : public Step {
 public:
  LinearStep(const Planes& x, const Planes& y, const Planes* residual) : x_(x), y_(y) {
    if (residual) residual_ = *residual;
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const int64_t tile = tile_rows(), tiles = (images + tile - 1) / tile;
    split(parallel, jobs() * tiles, weights() * std::max(images, kReading), kSerialMacs,
          [&](int64_t begin, int64_t end) {
            for (int64_t u = begin; u < end; ++u) {
              const int64_t row = u % tiles * tile;
              run_tile(u / tiles, row, std::min(tile, images - row), inputs, output);
            }
          });
  }

 protected:
  virtual int64_t jobs() const = 0;
  virtual int64_t weights() const = 0;
  virtual int64_t tile_rows() const = 0;
  virtual void run_tile(int64_t job, int64_t row, int64_t rows, std::span<const void* const> inputs,
                        void* output) const = 0;

  Planes x_, y_, residual_;
};

struct PackedF32 {
  PackedBytes bytes;
  Packed packed;
  std::vector<int64_t> offset;                // of each tap: its feature
  std::vector<std::pair<int64_t, int>> jobs;  // first panel, panels
  const kernels::GemmCompact& gemm;
  Epilogue epilogue;
};

class LinearF32Step final : public LinearStep {
 public:
  LinearF32Step(std::shared_ptr<const PackedF32> p, const Planes& x, const Planes& y, const Planes* residual)
      : LinearStep(x, y, residual), p_(std::move(p)) {
    for (int i = 0; i < p_->gemm.pixels[0][0]; ++i) {
      pixel_[i] = static_cast<int32_t>(i * x.image_stride);
      row_[i] = static_cast<int32_t>(i * y.image_stride);
      residual_row_[i] = static_cast<int32_t>(i * residual_.image_stride);
    }
  }
  std::string kernel() const override { return std::string("linear_f32__") + p_->gemm.isa; }

 private:
  int64_t jobs() const override { return static_cast<int64_t>(p_->jobs.size()); }
  int64_t weights() const override { return p_->packed.header->weights; }
  int64_t tile_rows() const override { return p_->gemm.pixels[0][0]; }

  void run_tile(int64_t job, int64_t row, int64_t rows, std::span<const void* const> inputs,
                void* output) const override {
    const auto& [first, panels] = p_->jobs[static_cast<size_t>(job)];
    const Panel &panel = p_->packed.panels[first], &last = p_->packed.panels[first + panels - 1];
    kernels::Output out{.y = static_cast<float*>(output) + y_.at(row, panel.first_filter, 0, 0),
                        .y_stride = 1,
                        .epilogue = p_->epilogue};
    if (p_->epilogue.residual) {
      out.residual = static_cast<const float*>(inputs[1]) + residual_.at(row, panel.first_filter, 0, 0);
      out.residual_stride = 1;
    }
    kernels::run_rows(p_->gemm, panels,
                      {
                          .x = static_cast<const float*>(inputs[0]) + x_.at(row, 0, 0, 0),
                          .offset = p_->offset.data() + panel.first_tap,
                          .n_taps = panel.n_taps,
                          .w = p_->packed.weights + panel.weight,
                          .panel_stride = panel.n_taps * panel.width,
                          .start = p_->packed.bias + panel.first_filter,
                          .filters = last.first_filter + last.filters - panel.first_filter,
                          .pixel = pixel_,
                          .row = row_,
                          .residual_row = residual_row_,
                          .out = out,
                      },
                      panel.width, static_cast<int>(rows));
  }

  std::shared_ptr<const PackedF32> p_;
  int32_t pixel_[kernels::kMaxPixels] = {}, row_[kernels::kMaxPixels] = {}, residual_row_[kernels::kMaxPixels] = {};
};

// Filters of one block that one tile computes: up to kLinearPanels panels, or kBlockPanels.
struct Bf16Job {
  int64_t first_filter, filters, first_tap, n_taps, weight, panel_size;
  int panels;
  bool listed;
};

struct PackedBf16 {
  std::vector<Bf16> weights;
  std::vector<float> bias;
  std::vector<int32_t> taps;
  std::vector<Bf16Job> jobs;
  const kernels::LinearBf16& kernels;
  Epilogue epilogue;
};

class LinearBf16Step final : public LinearStep {
 public:
  LinearBf16Step(std::shared_ptr<const PackedBf16> p, const Planes& x, const Planes& y, const Planes* residual)
      : LinearStep(x, y, residual), p_(std::move(p)) {}
  std::string kernel() const override { return std::string("linear_bf16__") + p_->kernels.isa; }

 private:
  int64_t jobs() const override { return static_cast<int64_t>(p_->jobs.size()); }
  int64_t weights() const override { return static_cast<int64_t>(p_->weights.size()); }
  int64_t tile_rows() const override {
    return p_->kernels.block ? kernels::kBlockRows : int64_t{1} << (p_->kernels.tiles - 1);
  }

  void run_tile(int64_t index, int64_t row, int64_t rows, std::span<const void* const> inputs,
                void* output) const override {
    const Bf16Job& job = p_->jobs[static_cast<size_t>(index)];
    if (p_->kernels.block && !job.listed) {
      p_->kernels.block(args(job, row, rows, inputs, output));
      return;
    }
    for (int log = p_->kernels.tiles - 1; log >= 0; --log) {
      for (const int64_t count = int64_t{1} << log; rows >= count; rows -= count, row += count) {
        p_->kernels.kernel[job.panels - 1][log](args(job, row, count, inputs, output));
      }
    }
  }

  kernels::LinearBf16Args args(const Bf16Job& job, int64_t row, int64_t rows, std::span<const void* const> inputs,
                               void* output) const {
    return {
        .x = static_cast<const Bf16*>(inputs[0]) + x_.at(row, 0, 0, 0),
        .x_stride = x_.image_stride,
        .taps = job.listed ? p_->taps.data() + job.first_tap : nullptr,
        .n_taps = job.n_taps,
        .w = p_->weights.data() + job.weight,
        .w_stride = job.panel_size,
        .bias = p_->bias.data() + job.first_filter,
        .residual = p_->epilogue.residual
                        ? static_cast<const Bf16*>(inputs[1]) + residual_.at(row, job.first_filter, 0, 0)
                        : nullptr,
        .residual_stride = residual_.image_stride,
        .y = static_cast<Bf16*>(output) + y_.at(row, job.first_filter, 0, 0),
        .y_stride = y_.image_stride,
        .filters = job.filters,
        .rows = static_cast<int>(rows),
        .panels = job.panels,
        .epilogue = p_->epilogue,
    };
  }

  std::shared_ptr<const PackedBf16> p_;
};

template <class Data, class StepOf>
class PackedOf final : public PackedLinear {
 public:
  PackedOf(std::shared_ptr<const Data> data, Dtype dtype, int64_t in, int64_t out)
      : data_(std::move(data)), dtype_(dtype), in_(in), out_(out) {}

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t) const override {
    check_rows("x", x, dtype_, in_);
    check_rows("y", y, dtype_, out_);
    SADMM_CHECK(data_->epilogue.residual == (residual != nullptr), kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted what the epilogue says");
    if (residual) check_rows("residual", *residual, dtype_, out_);
    return std::make_unique<StepOf>(data_, x, y, residual);
  }

 private:
  std::shared_ptr<const Data> data_;
  Dtype dtype_;
  int64_t in_, out_;
};

std::shared_ptr<const PackedBf16> pack_bf16(const LinearSpec& spec, Isa isa) {
  auto p = std::make_shared<PackedBf16>(PackedBf16{{}, {}, spec.taps, {}, kernels::linear_bf16(isa), spec.epilogue});
  const int64_t lanes = p->kernels.lanes;
  p->bias = spec.bias;
  p->bias.resize(static_cast<size_t>(spec.out_features + kernels::kBlockPanels * lanes), 0.0f);
  int64_t filter = 0;
  const float* block = spec.weight.data();
  for (size_t b = 0; b < spec.block_filters.size(); ++b) {
    const int64_t filters = spec.block_filters[b], first = spec.block_taps[b];
    const int64_t n_taps = spec.block_taps[b + 1] - first, pairs = (n_taps + 1) / 2;
    const bool listed = n_taps > 0 && spec.taps[first + n_taps - 1] != n_taps - 1;
    const bool in_blocks = p->kernels.block && !listed;
    const int64_t most = in_blocks ? kernels::kBlockPanels : kernels::kLinearPanels;
    const int64_t unit = in_blocks ? kernels::kBlockPairs : 1,
                  panel_size = (pairs + unit - 1) / unit * unit * 2 * lanes;
    for (int64_t f = 0; f < filters;) {
      const int64_t panels = std::min<int64_t>((filters - f + lanes - 1) / lanes, most);
      const int64_t n = std::min(filters - f, panels * lanes), weight = static_cast<int64_t>(p->weights.size());
      p->weights.resize(static_cast<size_t>(weight + panels * panel_size), Bf16{0});
      for (int64_t i = 0; i < n; ++i) {
        Bf16* panel = p->weights.data() + weight + i / lanes * panel_size + i % lanes * 2;
        for (int64_t t = 0; t < n_taps; ++t) {
          scalar::from_float(block[(f + i) * n_taps + t], panel[t / 2 * 2 * lanes + t % 2]);
        }
      }
      p->jobs.push_back({filter + f, n, first, n_taps, weight, panel_size, static_cast<int>(panels), listed});
      f += n;
    }
    block += filters * n_taps;
    filter += filters;
  }
  return p;
}

std::shared_ptr<const PackedF32> pack_f32(const TapTable& table, const Epilogue& epilogue, Isa isa) {
  auto p = std::make_shared<PackedF32>(PackedF32{pack(kOp, table), {}, {}, {}, kernels::gemm_compact(isa), epilogue});
  p->packed = unpack(kOp, p->bytes);
  p->offset = features_of(p->packed);
  for (int64_t i = 0; i < static_cast<int64_t>(p->packed.panels.size()); i += p->jobs.back().second) {
    p->jobs.emplace_back(i, next_panels(p->packed, i, p->gemm));
  }
  return p;
}

}  // namespace

std::shared_ptr<const PackedLinear> pack_linear(const LinearSpec& spec, Dtype dtype, Isa isa) {
  SADMM_CHECK(dtype == Dtype::kF32 || dtype == Dtype::kBf16, kOp, ": dtype got ", dtype_name(dtype),
              ", wanted f32 or bf16");
  const TapTable table = table_of(spec);
  check(kOp, table);
  int64_t filters = 0;
  for (const int32_t f : spec.block_filters) filters += f;
  SADMM_CHECK(filters == spec.out_features, kOp, ": block_filters got ", filters, " filters in all, wanted ",
              spec.out_features);
  if (dtype == Dtype::kF32) {
    return std::make_shared<PackedOf<PackedF32, LinearF32Step>>(pack_f32(table, spec.epilogue, isa), dtype,
                                                                spec.in_features, spec.out_features);
  }
  return std::make_shared<PackedOf<PackedBf16, LinearBf16Step>>(pack_bf16(spec, isa), dtype, spec.in_features,
                                                                spec.out_features);
}

}  // namespace structadmm
