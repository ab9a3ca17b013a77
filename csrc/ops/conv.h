// A convolution inside a segment: a specification, packed once for a family of kernels, planned for every shape.
//
//   y[n, f, oy, ox] = epilogue(bias[f] + sum over taps (c, ky, kx) of f: w[f, tap] * x[n, c, iy, ix])
//   iy = oy * stride[0] + ky * dilation[0] - padding[0], ix likewise
//
// The weight is canonical, f32, in blocks of filters that share their taps (ops/tap_table.h has the format); a dense
// weight is one block per conv group with every tap. Families differ in how they run it, never in what they compute:
//
//   taps_f32    tap lists per block of filters, f32
//   taps_bf16   the same in bf16 with f32 accumulation; x and y are bf16 planes. On tiles, blocks may be merged
//               (ops/merge_blocks.h): an infinity or NaN then reaches the filters of both
//   depthwise   one input channel per conv group, f32 or bf16
//   nonzeros    single weights, for non-structured sparsity, f32
//   winograd    3x3 of stride 1 with a quarter of the multiply-adds, for few or no pruned taps, in f32; with
//               AVX-512 also on bf16 planes. Its rounding errors are a few times those of a plain sum, and an infinity
//               makes NaN of the outputs beside it too
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/isa.h"
#include "ops/epilogue.h"
#include "ops/planes.h"
#include "ops/step.h"

namespace structadmm {

struct ConvSpec {
  int64_t in_channels = 0, out_channels = 0, groups = 1;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  std::vector<float> weight, bias;  // bias: [out_channels], or empty
  std::vector<int32_t> taps, block_filters, block_taps;
  Epilogue epilogue;

  int64_t out_size(int axis, int64_t in) const {
    return (in + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
};

// The weight in the order that a family's kernels read, shared by the plans for all shapes.
class PackedConv {
 public:
  virtual ~PackedConv() = default;
  virtual const char* family() const = 0;

  // x has at least the halo that `padding` (and the right and bottom edge that the kernel reaches) asks for, or is one
  // that takes_edges() or takes_f32() takes. residual: planes of y's sizes, null without epilogue.residual; the step's
  // inputs are then {x, residual}. residual and y may be the same memory if their planes are equal. images: the most
  // that a run has. Any of them may be in lanes where the family has lanes(), all of one grid that fits().
  virtual std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual,
                                     int64_t images) const = 0;

  // Whether plan() also takes an x without any halo, of images of this size, and runs faster on one of them at a time
  // than on a padded copy.
  virtual bool takes_edges([[maybe_unused]] int64_t batch, [[maybe_unused]] int64_t height,
                           [[maybe_unused]] int64_t width) const {
    return false;
  }

  // bf16: whether plan() also takes an x of f32 of this size, without any halo or gaps between its rows, and runs
  // faster on it than on a converted copy; and whether y may be f32.
  virtual bool takes_f32([[maybe_unused]] int64_t height, [[maybe_unused]] int64_t width) const { return false; }
  virtual bool gives_f32() const { return false; }

  // What a run reads of weights, where that is not what the specification has; else 0.
  virtual int64_t weight_bytes() const { return 0; }

  // Of a vector, where the family takes planes in lanes; else 0.
  virtual int64_t lanes() const { return 0; }
};

// Whether a convolution can have planes in lanes: a rectangle of outputs is that of inputs, unless maps are whole.
inline bool fits(const Grid& grid, const ConvSpec& s, const int64_t (&in)[2], const int64_t (&out)[2]) {
  const int64_t parts[2] = {grid.rows, grid.cols};
  for (int i = 0; i < 2; ++i) {
    if (parts[i] > 1 && (out[i] % parts[i] != 0 || in[i] != out[i] * s.stride[i])) return false;
  }
  return true;
}

// Each throws Error where the specification is not well formed or the family can't run it.
std::shared_ptr<const PackedConv> pack_conv_taps_f32(const ConvSpec& spec, Isa isa);
std::shared_ptr<const PackedConv> pack_conv_taps_bf16(const ConvSpec& spec, Isa isa);
std::shared_ptr<const PackedConv> pack_conv_depthwise(const ConvSpec& spec, Dtype dtype, Isa isa);
std::shared_ptr<const PackedConv> pack_conv_nonzeros(const ConvSpec& spec, Isa isa);
std::shared_ptr<const PackedConv> pack_conv_winograd(const ConvSpec& spec, Isa isa);

// Whether the family winograd can run it, and takes planes of this dtype; and whether it should be faster than taps on
// maps of these outputs, by an estimate that is the same for any number of images.
bool can_winograd(const ConvSpec& spec);
bool winograd_holds(Dtype dtype, Isa isa);
bool winograd_pays(const ConvSpec& spec, int64_t height, int64_t width, Dtype dtype, Isa isa);

}  // namespace structadmm
