#include "ops/compact_cuda.h"

#include "base/cuda_status.h"
#include "kernels/gemm_compact/cuda.h"

namespace structadmm {

void conv2d_compact_cuda(const char* op, const Conv2dShape& s, const float* x, const DevicePacked& packed, float* y,
                         void* stream) {
  const int64_t outputs = s.out_h * s.out_w;
  const int status =
      kernels::conv_compact_cuda({.x = x,
                                  .x_strides = {s.x_strides[0], s.x_strides[1], s.x_strides[2], s.x_strides[3]},
                                  .batch = s.batch,
                                  .channels = s.channels,
                                  .height = s.height,
                                  .width = s.width,
                                  .filters = packed.filters,
                                  .out_h = s.out_h,
                                  .out_w = s.out_w,
                                  .kernel = {packed.kernel_h, packed.kernel_w},
                                  .stride = {s.stride[0], s.stride[1]},
                                  .padding = {s.padding[0], s.padding[1]},
                                  .dilation = {s.dilation[0], s.dilation[1]},
                                  .packed = packed.data,
                                  .packed_bytes = packed.bytes,
                                  .y = y,
                                  .y_strides = {packed.filters * outputs, outputs, 1}},
                                 stream);
  check_cuda(op, status);
}

void linear_compact_cuda(const char* op, const LinearShape& s, const float* x, const DevicePacked& packed, float* y,
                         void* stream) {
  // One image whose pixels are the rows: neighbouring threads then share the weights they read.
  const int status = kernels::conv_compact_cuda({.x = x,
                                                 .x_strides = {0, 1, 0, s.x_stride},
                                                 .batch = 1,
                                                 .channels = packed.in_channels,
                                                 .height = 1,
                                                 .width = s.rows,
                                                 .filters = packed.filters,
                                                 .out_h = 1,
                                                 .out_w = s.rows,
                                                 .kernel = {1, 1},
                                                 .stride = {1, 1},
                                                 .padding = {0, 0},
                                                 .dilation = {1, 1},
                                                 .packed = packed.data,
                                                 .packed_bytes = packed.bytes,
                                                 .y = y,
                                                 .y_strides = {0, 1, packed.filters}},
                                                stream);
  check_cuda(op, status);
}

}  // namespace structadmm
