#include <cuda_runtime.h>

#include "kernels/gemm_compact/cuda.h"
#include "kernels/gemm_compact/packed.h"

namespace structadmm::kernels {
namespace {

constexpr int kThreads = 256;

template <int Width>
__device__ void panel_pixel(const ConvCudaArgs& a, const char* packed, const PackedHeader& h, const Panel& panel,
                            int64_t image, int64_t oy, int64_t ox) {
  const float* bias = reinterpret_cast<const float*>(packed + h.bias_at) + panel.first_filter;
  const float* w = reinterpret_cast<const float*>(packed + h.weights_at) + panel.weight;
  const Tap* taps = reinterpret_cast<const Tap*>(packed + h.taps_at) + panel.first_tap;
  float acc[Width];
#pragma unroll
  for (int f = 0; f < Width; ++f) acc[f] = bias[f];
  const float* x = a.x + image * a.x_strides[0];
  for (int64_t t = 0; t < panel.n_taps; ++t, w += Width) {
    const Tap tap = taps[t];
    const int64_t iy = oy * a.stride[0] + tap.position / a.kernel[1] * a.dilation[0] - a.padding[0];
    const int64_t ix = ox * a.stride[1] + tap.position % a.kernel[1] * a.dilation[1] - a.padding[1];
    const bool inside = iy >= 0 && iy < a.height && ix >= 0 && ix < a.width;
    const float v = inside ? x[tap.channel * a.x_strides[1] + iy * a.x_strides[2] + ix * a.x_strides[3]] : 0.0f;
#pragma unroll
    for (int f = 0; f < Width; ++f) acc[f] = __fmaf_rn(w[f], v, acc[f]);
  }
  float* y = a.y + image * a.y_strides[0] + panel.first_filter * a.y_strides[1] + (oy * a.out_w + ox) * a.y_strides[2];
#pragma unroll
  for (int f = 0; f < Width; ++f) {
    if (f < panel.filters) y[f * a.y_strides[1]] = acc[f];
  }
}

// Neighbouring threads take neighbouring pixels, blockIdx.y strides over the panels: only the header, which is in
// device memory, knows how many there are.
__global__ void conv_kernel(ConvCudaArgs a) {
  const char* packed = static_cast<const char*>(a.packed);
  const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(packed);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.batch * a.out_h * a.out_w) return;
  const int64_t image = i / (a.out_h * a.out_w), pixel = i % (a.out_h * a.out_w);
  const bool fits = h.bytes == a.packed_bytes && h.in_channels == a.channels && h.out_channels == a.filters &&
                    h.kernel_h == a.kernel[0] && h.kernel_w == a.kernel[1];
  if (!fits) {
    for (int64_t f = blockIdx.y; f < a.filters; f += gridDim.y) {
      a.y[image * a.y_strides[0] + f * a.y_strides[1] + pixel * a.y_strides[2]] = __int_as_float(0x7fffffff);
    }
    return;
  }
  for (int64_t p = blockIdx.y; p < h.panels; p += gridDim.y) {
    const Panel& panel = reinterpret_cast<const Panel*>(packed + h.panels_at)[p];
    if (panel.width == 16) {
      panel_pixel<16>(a, packed, h, panel, image, pixel / a.out_w, pixel % a.out_w);
    } else if (panel.width == 8) {
      panel_pixel<8>(a, packed, h, panel, image, pixel / a.out_w, pixel % a.out_w);
    } else {
      panel_pixel<4>(a, packed, h, panel, image, pixel / a.out_w, pixel % a.out_w);
    }
  }
}

}  // namespace

int conv_compact_cuda(const ConvCudaArgs& a, void* stream) {
  const int64_t pixels = a.batch * a.out_h * a.out_w;
  if (pixels == 0) return 0;
  const dim3 grid(static_cast<unsigned>((pixels + kThreads - 1) / kThreads),
                  static_cast<unsigned>(min(static_cast<int64_t>(65535), (a.filters + 3) / 4)));
  conv_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace structadmm::kernels
