// The compacted convolution and linear layer on the GPU: one thread per output pixel and panel of filters, plain.
//
// Reads a packed weight in device memory (packed.h). Accumulates over the taps in order by fused multiply-add from the
// bias, as the CPU kernels do. Launchers return a status (base/cuda_status.h) and wait for nothing.
#pragma once

#include <cstdint>

namespace structadmm::kernels {

struct ConvCudaArgs {
  const float* x;
  int64_t x_strides[4];  // batch, channel, row, column
  int64_t batch, channels, height, width, filters, out_h, out_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const void* packed;
  int64_t packed_bytes;
  float* y;
  int64_t y_strides[3];  // batch, filter, pixel
};

// If the packed weight is not one of these sizes, which only the device can see, y becomes NaN.
int conv_compact_cuda(const ConvCudaArgs& args, void* stream);

}  // namespace structadmm::kernels
