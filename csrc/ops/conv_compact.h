// 2-d convolution on a packed compacted weight, f32.
//
//   y[n, f, oy, ox] = bias[f] + sum over taps (c, ky, kx) of f: w[f, tap] * x[n, c, iy, ix]
//   iy = oy * stride[0] + ky * dilation[0] - padding[0], ix likewise; x is zero outside
//
// x has any strides; y is contiguous. The result does not depend on the number of threads, nor on the batch around an
// image. Beyond x, y and the weight a convolution needs at most one padded copy of x, made for as many images at a time
// as fit in a quarter of a megabyte (one at least) and kept per thread for the next call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/isa.h"
#include "base/parallel.h"
#include "ops/tap_table.h"

namespace structadmm {

struct Conv2dArgs {
  int64_t stride[2], padding[2], dilation[2];
  bool operator==(const Conv2dArgs&) const = default;
};

// All that the op needs to know of its input: checked sizes, strides of x and sizes of y.
struct Conv2dShape : Conv2dArgs {
  int64_t batch, channels, height, width;
  int64_t x_strides[4];
  int64_t out_h, out_w;
  bool operator==(const Conv2dShape&) const = default;
};

// Throws Error if x is not an f32 image batch on that device that can be convolved so.
Conv2dShape conv2d_shape(const char* op, const TensorView& x, Device device, int64_t in_channels, int64_t kernel_h,
                         int64_t kernel_w, const Conv2dArgs& args);

// y: [batch, filters, out_h, out_w], contiguous.
void conv2d_compact(const Conv2dShape& shape, const float* x, const Packed& packed, float* y, Isa isa,
                    Parallel& parallel);

// The names of the kernels that would run, one per panel in order; a pure function of its arguments (isa need not be
// this CPU's).
std::vector<std::string> conv2d_kernels(const Conv2dShape& shape, const Packed& packed, Isa isa);

}  // namespace structadmm
