// conv2d_compact and linear_compact on CUDA, on a packed weight in device memory. They wait for nothing.
#pragma once

#include "ops/conv_compact.h"
#include "ops/linear_compact.h"

namespace structadmm {

struct DevicePacked {
  const void* data;
  int64_t bytes, filters, in_channels, kernel_h, kernel_w;  // as the caller believes; the kernel makes y NaN if not so
};

void conv2d_compact_cuda(const char* op, const Conv2dShape& shape, const float* x, const DevicePacked& packed, float* y,
                         void* stream);
void linear_compact_cuda(const char* op, const LinearShape& shape, const float* x, const DevicePacked& packed, float* y,
                         void* stream);

}  // namespace structadmm
