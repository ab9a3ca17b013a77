// Sums of squares of V = W + U over the groups of a weight matrix, the weights outside a mask left out.
//
//   columns:  sums[c] (+)= sum over r in [0, rows) of v[r, c]^2,  c in [0, cols)
//   row:      lanes[c mod 32] += v[c]^2,  c in [0, n)
//
// The summation contract, which makes every variant give the same bits: each sum of `columns`, and each of the 32 lanes
// of `row`, is one accumulator, to which squares are added in ascending order of r or c by fused multiply-add. The
// caller folds the lanes 16-8-4-2-1 (fold_lanes). A weight outside the mask counts as +0.
//
// W is f32, bf16 or f16, U is f32, a mask byte is nonzero for weights that count; U and mask may be null. Strides are
// in elements between rows; within a row elements are adjacent. No alignment is asked for. Nothing is checked here.
#pragma once

#include <cstdint>

#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm {

struct SumsqColumns {
  const void* w;
  const float* u;
  const uint8_t* mask;
  int64_t w_stride, u_stride, mask_stride;
  int64_t rows, cols;
  bool add;     // to what sums holds; otherwise from zero
  float* sums;  // [cols]
};

// n is any number in the last piece of a row, and a multiple of 32 in the pieces before it.
struct SumsqRow {
  const void* w;
  const float* u;
  const uint8_t* mask;
  int64_t n;
  float* lanes;  // [32]
};

struct GroupSumsqKernel {
  const char* name;
  Isa isa;
  Dtype dtype;
  void (*columns)(const SumsqColumns&);
  void (*row)(const SumsqRow&);
};

// The best variant for a dtype that needs no more than this ISA. A pure function: it does not ask which CPU this is.
const GroupSumsqKernel& select_group_sumsq(Isa isa, Dtype dtype);

inline float fold_lanes(float* lanes) {
  for (int half = 16; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace structadmm
