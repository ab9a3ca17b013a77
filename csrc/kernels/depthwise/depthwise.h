// One filter of a depthwise convolution on one plane; f32 or bf16, arithmetic in f32.
//
//   y[oy][ox] = act(bias + sum over taps t of w[t] * x[oy * stride * x_pitch + ox * stride + offset(t)] +
//   residual[oy][ox])
//
// x points to where the first tap of the first output reads, zeros around the plane included; offset = row * x_pitch +
// column of a tap. Two kernels:
//
//   square   every tap of a K x K kernel, K = 3, 5, 7, stride 1 or 2, no dilation: four rows of outputs at a time, so
//   that
//            what is loaded serves up to K of them; sums run down the columns of the kernel
//   listed   any taps, stride and dilation. A vector of outputs is wherever a DepthwiseVector says: for stride 1 across
//            rows of x too, of which narrow maps would fill only a part of a vector; sums run over the taps in order
//
// Whole vectors of x are loaded: for a row of `square`, its outputs rounded up to 16; `exact` of `listed` reads nothing
// but what it needs, slowly. y and residual are written and read only where outputs are; they may be the same.
#pragma once

#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm::kernels {

// Lanes first to last - 1 of a vector, lane 0 of which would lie at y and residual + these offsets.
struct DepthwiseSegment {
  int64_t y_offset, residual_offset;
  int32_t first, last;
};

struct DepthwiseVector {
  int64_t x_offset;
  int32_t first_segment, segments;
};

struct DepthwiseArgs {
  const void* x;
  void* y;
  const void* residual;  // may be null
  const float* w;        // square: [K][K]
  float bias;
  Epilogue epilogue;
  int64_t stride;  // of columns
  // of square
  int64_t out_height, out_width, x_pitch, y_pitch, residual_pitch;
  // of listed
  const int64_t* offsets;  // [n_taps]
  int64_t n_taps, n_vectors;
  const DepthwiseVector* vectors;
  const DepthwiseSegment* segments;
};

using DepthwiseKernel = void (*)(const DepthwiseArgs&);

struct Depthwise {
  const char* isa;
  int lanes;
  DepthwiseKernel square[2][3][2];  // [f32, bf16][K = 3, 5, 7][stride - 1]
  DepthwiseKernel listed[2], exact[2];
};

const Depthwise& depthwise(Isa isa);

}  // namespace structadmm::kernels
