// The steps of a segment that are not convolutions. Each planned for planes, dtype f32 or bf16 (arithmetic in f32), on
// an ISA.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/isa.h"
#include "base/tensor_view.h"
#include "ops/epilogue.h"
#include "ops/planes.h"
#include "ops/step.h"

namespace structadmm {

// A user's tensor [N, C, H, W] or [N, C] (any strides in elements, f32 or bf16 or f16) into planes, converted.
// channels: those that are wanted, ascending; the others of y may be left as they are. Empty: all.
std::unique_ptr<Step> import_step(const TensorView& x, const Planes& y, Isa isa,
                                  const std::vector<int64_t>& channels = {});

// Planes into a user's tensor, likewise; a flattened output [N, C*H*W] is given as [N, C, H, W] with its strides.
std::unique_ptr<Step> export_step(const Planes& x, const TensorView& y, int64_t images, Isa isa);

// Planes into planes of the same sizes: another halo, order, dtype; `epilogue` on the way (residual: a second input).
// This is also the element-wise activation and the addition of two values.
std::unique_ptr<Step> copy_step(const Planes& x, const Planes& y, const Planes* residual, const Epilogue& epilogue,
                                int64_t images, Isa isa);

// y = epilogue(x * scale[c] + shift[c]): BatchNorm that could not be folded. scale, shift: [channels].
std::unique_ptr<Step> scale_shift_step(const Planes& x, const Planes& y, std::vector<float> scale,
                                       std::vector<float> shift, const Epilogue& epilogue, int64_t images, Isa isa);

// y = epilogue(x * gate), gate of x's sizes or of height = width = 1 (squeeze-excite). Inputs {x, gate}.
std::unique_ptr<Step> multiply_step(const Planes& x, const Planes& gate, const Planes& y, const Epilogue& epilogue,
                                    int64_t images, Isa isa);

// [N, C, H, W] to [N, C*H*W] as rows of features, in PyTorch's order.
std::unique_ptr<Step> flatten_step(const Planes& x, const Planes& y, int64_t images, Isa isa);

// Max or average over windows, as nn.MaxPool2d and nn.AvgPool2d compute it; y's sizes are those of the output.
struct Pool {
  bool max = true;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  bool count_include_pad = true;  // of the average
  int64_t divisor_override = 0;   // of the average, 0: none
};
std::unique_ptr<Step> pool_step(const Planes& x, const Planes& y, const Pool& pool, int64_t images, Isa isa);

// nn.AdaptiveAvgPool2d (max: nn.AdaptiveMaxPool2d) to y's height and width; 1 x 1 is the global mean.
std::unique_ptr<Step> adaptive_pool_step(const Planes& x, const Planes& y, bool max, int64_t images, Isa isa);

// y = epilogue(x W^T + bias) on rows of features, from a compacted weight (ops/tap_table.h; kernel 1 x 1, one conv
// group).
struct LinearSpec {
  int64_t in_features = 0, out_features = 0;
  std::vector<float> weight, bias;
  std::vector<int32_t> taps, block_filters, block_taps;
  Epilogue epilogue;
};
class PackedLinear {
 public:
  virtual ~PackedLinear() = default;
  virtual std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual,
                                     int64_t images) const = 0;
};
// dtype: of x and y; bf16 weights are rounded to bf16, sums are f32.
std::shared_ptr<const PackedLinear> pack_linear(const LinearSpec& spec, Dtype dtype, Isa isa);
// For non-structured sparsity: over single weights, f32.
std::shared_ptr<const PackedLinear> pack_linear_nonzeros(const LinearSpec& spec, Isa isa);

}  // namespace structadmm
