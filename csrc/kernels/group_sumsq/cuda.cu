#include "base/load.cuh"
#include "kernels/group_sumsq/cuda.h"

namespace structadmm {
namespace {

constexpr int kThreads = 256;

__device__ float load_v(const WeightShape& shape, const StridedWeight& w, const StridedWeight& u,
                        const StridedWeight& mask, int64_t o, int64_t j) {
  if (mask.data && !static_cast<const uint8_t*>(mask.data)[mask.at(shape, o, j)]) return 0.0f;
  float v = load_float(w.data, w.dtype, w.at(shape, o, j));
  if (u.data) v += static_cast<const float*>(u.data)[u.at(shape, o, j)];
  return v;
}

// One thread per cell: neighbours read neighbouring columns, and filters are added in ascending order.
__global__ void cells_kernel(WeightShape shape, CudaBands b, StridedWeight w, StridedWeight u, StridedWeight mask,
                             float* cells) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = shape.row();
  if (i >= b.bands * row) return;
  const int64_t band = i / row, j = i % row;
  const int64_t group = band / b.bands_per_group;
  const int64_t begin = group * b.group_filters + band % b.bands_per_group * b.band_filters;
  const int64_t end = min(begin + b.band_filters, (group + 1) * b.group_filters);
  float sum = 0.0f;
  for (int64_t o = begin; o < end; ++o) {
    const float v = load_v(shape, w, u, mask, o, j);
    sum = __fmaf_rn(v, v, sum);
  }
  cells[i] = sum;
}

__global__ void fold_kernel(const float* cells, int64_t n, int64_t taps, float* scores) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  float sum = cells[i * taps];
  for (int64_t t = 1; t < taps; ++t) sum += cells[i * taps + t];
  scores[i] = sum;
}

// One warp per filter: its lanes are the 32 lanes of the contract.
__global__ void rows_kernel(WeightShape shape, bool channels_last, StridedWeight w, StridedWeight u, StridedWeight mask,
                            float* scores) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (o >= shape.filters) return;
  float sum = 0.0f;
  for (int64_t m = threadIdx.x % 32; m < shape.row(); m += 32) {
    const int64_t j = channels_last ? m % shape.channels * shape.taps() + m / shape.channels : m;
    const float v = load_v(shape, w, u, mask, o, j);
    sum = __fmaf_rn(v, v, sum);
  }
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
  if (threadIdx.x % 32 == 0) scores[o] = sum;
}

}  // namespace

int group_sumsq_cells_cuda(const WeightShape& shape, const CudaBands& bands, const StridedWeight& w,
                           const StridedWeight& u, const StridedWeight& mask, float* cells, void* stream) {
  cells_kernel<<<blocks_for(bands.bands * shape.row(), kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, bands, w, u, mask, cells);
  return cudaGetLastError();
}

int group_sumsq_fold_cuda(const float* cells, int64_t n, int64_t taps, float* scores, void* stream) {
  fold_kernel<<<blocks_for(n, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(cells, n, taps, scores);
  return cudaGetLastError();
}

int group_sumsq_rows_cuda(const WeightShape& shape, bool channels_last, const StridedWeight& w, const StridedWeight& u,
                          const StridedWeight& mask, float* scores, void* stream) {
  rows_kernel<<<blocks_for(shape.filters, kThreads / 32), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, channels_last, w, u, mask, scores);
  return cudaGetLastError();
}

}  // namespace structadmm
