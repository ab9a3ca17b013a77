// A weight [O, Cg, *kernel] of up to three kernel dimensions as a plain struct that a CUDA kernel can take by value.
#pragma once

#include <cstdint>

#include "base/tensor_view.h"

#ifdef __CUDACC__
#define SADMM_HOST_DEVICE __host__ __device__
#else
#define SADMM_HOST_DEVICE
#endif

namespace structadmm {

// Sizes shared by all tensors of a weight's shape. A missing kernel dimension has size 1.
struct WeightShape {
  int64_t filters, channels, kernel[3];

  SADMM_HOST_DEVICE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  SADMM_HOST_DEVICE int64_t row() const { return channels * taps(); }
};

// Strides are in elements. data may be null for an operand that is absent.
struct StridedWeight {
  void* data;
  Dtype dtype;
  bool dense;  // a row is dense in logical order
  int64_t row_stride, channel_stride, kernel_stride[3];

  // The element of filter o and logical index j.
  SADMM_HOST_DEVICE int64_t at(const WeightShape& shape, int64_t o, int64_t j) const {
    if (dense) return o * row_stride + j;
    const int64_t c = j / shape.taps(), t = j % shape.taps();
    const int64_t k2 = t % shape.kernel[2], k1 = t / shape.kernel[2] % shape.kernel[1],
                  k0 = t / (shape.kernel[2] * shape.kernel[1]);
    return o * row_stride + c * channel_stride + k0 * kernel_stride[0] + k1 * kernel_stride[1] + k2 * kernel_stride[2];
  }
};

}  // namespace structadmm
