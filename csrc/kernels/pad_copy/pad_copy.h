// Copies one channel of a batch of images between zeros, so that a convolution reads it without a test for the border.
//
//   dst[n][lead_rows + r][lead_cols + c] = src[n * image_stride + r * row_stride + c * col_stride],  r < rows, c < cols
//
// and zeros elsewhere. A row has `pitch` floats and an image `image_rows` rows; both may be smaller than leading zeros,
// data and trailing zeros together: the zeros that trail a row are then those that lead the next one. Behind the last
// image come `tail` zeros. Strides that are not one take some pixels only (one phase of a strided convolution) or
// another layout.
#pragma once

#include <cstdint>

#include "base/isa.h"

namespace structadmm::kernels {

inline constexpr int kPadCopySpill = 16;  // floats behind the tail that are overwritten, besides lead_cols of them

struct PadCopyArgs {
  const float* src;
  int64_t image_stride, row_stride, col_stride;
  float* dst;
  int64_t images, image_rows, pitch, tail;
  int64_t lead_rows, rows, lead_cols,
      cols;  // lead + data fit: lead_rows + rows <= image_rows, lead_cols + cols <= pitch
};

using PadCopyKernel = void (*)(const PadCopyArgs&);

PadCopyKernel pad_copy(Isa isa);

}  // namespace structadmm::kernels
