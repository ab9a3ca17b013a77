// The family taps_f32: plans and steps around ops/tap_plan.h.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "ops/conv.h"
#include "ops/spec_table.h"
#include "ops/tap_plan.h"

namespace structadmm {
namespace {

constexpr auto kOp = "conv_taps_f32";

class TapsStep final : public Step {
 public:
  TapsStep(std::shared_ptr<const PackedBytes> bytes, TapPlan plan)
      : bytes_(std::move(bytes)), packed_(unpack(kOp, *bytes_)), plan_(std::move(plan)) {}

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const auto* residual = plan_.epilogue.residual ? static_cast<const float*>(inputs[1]) : nullptr;
    run_taps(plan_, packed_, static_cast<const float*>(inputs[0]), residual, static_cast<float*>(output), images,
             parallel);
  }

  std::string kernel() const override {
    std::vector<std::string> names = tap_kernels(plan_, packed_);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    std::string all;
    for (const auto& name : names) all += (all.empty() ? "" : "+") + name;
    return all;
  }

 private:
  std::shared_ptr<const PackedBytes> bytes_;
  Packed packed_;
  TapPlan plan_;
};

class TapsConv final : public PackedConv {
 public:
  TapsConv(const ConvSpec& spec, Isa isa)
      : geometry_{
            {spec.stride[0], spec.stride[1]}, {spec.padding[0], spec.padding[1]}, {spec.dilation[0], spec.dilation[1]}},
        epilogue_(spec.epilogue),
        isa_(isa) {
    bytes_ = std::make_shared<const PackedBytes>(pack(kOp, table_of(spec)));
    const int32_t filters = unpack(kOp, *bytes_).header->out_channels;
    SADMM_CHECK(spec.out_channels == filters, kOp, ": out_channels got ", spec.out_channels, ", wanted the ", filters,
                " filters of the weight");
  }

  const char* family() const override { return "taps_f32"; }
  bool takes_edges(int64_t batch, int64_t height, int64_t width) const override {
    return structadmm::takes_edges(unpack(kOp, *bytes_), geometry_, batch, height, width, isa_);
  }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    SADMM_CHECK((residual != nullptr) == epilogue_.residual, kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted ", epilogue_.residual ? "planes" : "none");
    return std::make_unique<TapsStep>(
        bytes_, plan_taps(kOp, unpack(kOp, *bytes_), geometry_, x, y, residual, epilogue_, images, isa_));
  }

 private:
  ConvGeometry geometry_;
  Epilogue epilogue_;
  Isa isa_;
  std::shared_ptr<const PackedBytes> bytes_;
};

}  // namespace

std::shared_ptr<const PackedConv> pack_conv_taps_f32(const ConvSpec& spec, Isa isa) {
  return std::make_shared<TapsConv>(spec, isa);
}

}  // namespace structadmm
