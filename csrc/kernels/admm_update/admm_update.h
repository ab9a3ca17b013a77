// The elementwise halves of an ADMM iteration over a weight matrix, in f32, one rounding per operation.
//
//   update:   v = w + u;  z' = v where keep and mask, +0 elsewhere;  u' = v - z';  z, u <- z', u'
//             and the sums of squares of  w - z', z' - z, w, z', u'  (Boyd's r, s / rho, the norms of his stopping
//             rule): each piece of 256 elements of a row in 16 f32 lanes (element mod 16) by fused multiply-add, the
//             lanes then added to 8 f64 accumulators (lane mod 8), lower lanes first, pieces and rows in ascending
//             order
//   penalty:  g <- g + rho * ((w - z) + u), the gradient of rho/2 ||W - Z + U||^2, rounded once to g's dtype
//
// W and G are f32, bf16 or f16, Z and U f32; keep and mask are bytes, nonzero is true. Strides are in elements between
// rows (keep_stride 0: one row of keep for all); within a row elements are adjacent. Z and U alias nothing else.
// Nothing is checked here.
#pragma once

#include <cstdint>

#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm {

struct AdmmUpdate {
  const void* w;
  float* z;
  float* u;
  const uint8_t* keep;
  const uint8_t* mask;  // may be null
  int64_t w_stride, z_stride, u_stride, keep_stride, mask_stride;
  int64_t rows, cols;
  double (*sums)[8];  // [5][8], added to
};

struct AdmmPenalty {
  void* g;
  const void* w;
  const float* z;
  const float* u;
  float rho;
  int64_t n;
};

struct AdmmUpdateKernel {
  const char* name;
  Isa isa;
  Dtype dtype;
  void (*update)(const AdmmUpdate&);
  void (*penalty)(const AdmmPenalty&);
};

// The best variant for W's dtype that needs no more than this ISA. A pure function: it does not ask which CPU this is.
const AdmmUpdateKernel& select_admm_update(Isa isa, Dtype dtype);

}  // namespace structadmm
