// Largest value or mean over windows of one plane, or over whole planes; f32 or bf16, arithmetic in f32.
//
//   windows   y[oy][ox] = max over (iy, ix) in the window of x[iy][ix], or sum / (row_divisors[oy] *
//   column_divisors[ox])
//             iy = row.first + i * row_step, i < row.count: those inside the plane
//             ix = ox * column_stride - column_lead + j * column_step, j < kernel_columns: outside counts -inf or 0
//             or, where column_stride is 0, columns[ox].first + j, j < columns[ox].count
//   planes    y[c * y_stride] = max or mean over x[c * channel_stride + r * pitch + i], r < height, i < width
//
// The maximum is NaN where a value is. A window without a value has maximum -inf. The sum of `planes` reads also what
// lies between the end of a row and the next, which is zero. `buffer` holds one row and what lies beside it.
// kernel_rows: as kernel_columns, or 0. Where both are 1, and nothing is padded, every window has exactly one value.
#pragma once

#include <cstdint>

#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm::kernels {

struct PoolWindow {
  int32_t first = 0, count = 0;
};

struct PoolArgs {
  const void* x;
  void* y;
  int64_t x_pitch, y_pitch, width, out_height, out_width;
  const PoolWindow* rows;     // [out_height]
  const PoolWindow* columns;  // [out_width]
  const float *row_divisors, *column_divisors;
  int64_t row_step, column_stride, column_lead, column_step, kernel_columns, kernel_rows;
  float* buffer;        // [buffer_size]
  int64_t buffer_size;  // at least that of pool_buffer
};

// Lead, row, and what the last vector of windows reaches behind it.
constexpr int64_t pool_buffer(int64_t width, int64_t out_width, int64_t stride, int64_t lead, int64_t reach) {
  constexpr int64_t kLanes = 16;
  const int64_t windows = (out_width + 2 * kLanes) * stride + reach;
  return (windows > lead + width ? windows : lead + width) + kLanes;
}

struct PoolPlanesArgs {
  const void* x;
  void* y;
  int64_t channels, channel_stride, y_stride, height, width, pitch;
};

struct PoolKernels {
  const char* isa;
  void (*windows[2][2])(const PoolArgs&);       // [max, mean][f32, bf16]
  void (*planes[2][2])(const PoolPlanesArgs&);  // likewise
};

const PoolKernels& pool_kernels(Isa isa);

}  // namespace structadmm::kernels
