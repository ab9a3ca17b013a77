// 2-d convolution and linear layer on a packed compacted weight, f32.
//
//   y[n, f, oy, ox] = bias[f] + sum over taps (c, ky, kx) of f of w[f, tap] * x[n, c, oy * sh + ky * dh - ph, ox * sw +
//   kx * dw - pw]
//
// x has any strides; y is contiguous. The result does not depend on the number of threads, nor on the batch around an
// image. Beyond x, y and the weight a convolution needs at most one padded copy of x, made for as many images at a time
// as fit in half a megabyte (one at least) and kept per thread for the next call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/isa.h"
#include "base/parallel.h"
#include "ops/tap_table.h"

namespace structadmm {

struct Conv2dShape {
  int64_t batch, channels, height, width;
  int64_t stride[2], padding[2], dilation[2];
};

// The spatial size of the output on an axis. Throws Error if there is none.
int64_t conv_out_size(const char* op, int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);

void conv2d_compact(const char* op, const Conv2dShape& shape, const float* x, const int64_t (&x_strides)[4],
                    const Packed& packed, float* y, Isa isa, Parallel& parallel);

// y [rows, filters] = x [rows, features] W^T + bias; rows of x are x_stride apart.
void linear_compact(const char* op, int64_t rows, int64_t features, const float* x, int64_t x_stride,
                    const Packed& packed, float* y, Isa isa, Parallel& parallel);

// The names of the kernels that would run, one per panel in order; a pure function of its arguments (isa need not be
// this CPU's).
std::vector<std::string> conv2d_kernels(const char* op, const Conv2dShape& shape, const Packed& packed, Isa isa);

}  // namespace structadmm
