// Element-wise work on rows of pixels, between dtypes f32, bf16 and f16, arithmetic in f32.
//
//   kCopy      y[r][i] = epilogue(x[r][i])
//   kAdd       y[r][i] = epilogue(x[r][i] + b[r][i])
//   kMultiply  y[r][i] = epilogue(x[r][i] * b[r][i])
//   kGate      y[r][i] = epilogue(x[r][i] * b[r])
//   kAffine    y[r][i] = epilogue(x[r][i] * scale[r] + shift[r])       one rounding
//   kAffines   y[r][i] = epilogue(x[r][i] * scale[r][i] + shift[r][i])
//
// Row r of an operand begins r * its stride behind the pointer, in elements. b has x's dtype. y may be the memory of x
// or b if it is the same row by row. kCopy takes all dtypes, the others f32 and bf16. And, without an epilogue:
//
//   transpose     y[i * y_stride + r] = x[r * x_stride + i]
//   split_triples y[i % 3 * y_stride + i / 3] = x[i], i < 3 * cols: pixels of three channels to three planes
//
// Nothing is read or written but these elements.
#pragma once

#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm::kernels {

enum class RowOp { kCopy, kAdd, kMultiply, kGate, kAffine, kAffines };
inline constexpr int kRowOps = 6;

struct RowsArgs {
  const void *x = nullptr, *b = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  void* y = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t x_stride = 0, b_stride = 0, scale_stride = 0, y_stride = 0;
  Epilogue epilogue = {};
};

using RowsKernel = void (*)(const RowsArgs&);

// By dtype: 0 f32, 1 bf16, 2 f16; null where there is none.
struct RowsKernels {
  const char* isa;
  int lanes;
  RowsKernel rows[kRowOps][3][3];  // [op][x][y]
  RowsKernel move[2];              // kCopy of f32 to f32, bf16 to bf16, without an epilogue
  RowsKernel transpose[3][3], split_triples[3][3];
};

constexpr int dtype_index(Dtype dtype) {
  return dtype == Dtype::kF32 ? 0 : dtype == Dtype::kBf16 ? 1 : 2;
}

const RowsKernels& rows_kernels(Isa isa);

}  // namespace structadmm::kernels
