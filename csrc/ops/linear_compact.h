// Linear layer on a packed compacted weight, f32: y[row, f] = bias[f] + sum over taps c of f: w[f, c] * x[row, c].
//
// Rows of x may lie apart; y is contiguous. Nothing is copied. The result of a row depends neither on the number of
// threads nor on the other rows.
#pragma once

#include <cstdint>

#include "base/isa.h"
#include "base/parallel.h"
#include "ops/tap_table.h"

namespace structadmm {

struct LinearShape {
  int64_t rows, x_stride;
};

// x [..., features] as a matrix. Throws Error if it is not f32 on that device, with so many features; contiguous, but
// for the distance between the rows of a matrix.
LinearShape linear_shape(const char* op, const TensorView& x, Device device, int64_t in_features);

// y: [rows, filters].
void linear_compact(const LinearShape& shape, const float* x, const Packed& packed, float* y, Isa isa,
                    Parallel& parallel);

}  // namespace structadmm
