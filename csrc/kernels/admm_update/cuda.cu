#include "base/load.cuh"
#include "kernels/admm_update/cuda.h"

namespace structadmm {
namespace {

constexpr int kThreads = 256;

__device__ bool kept(const CudaKeep& k, int64_t o, int64_t j) {
  if (!k.keep) return true;
  const int64_t band = o / k.group_filters * k.bands_per_group + o % k.group_filters / k.band_filters;
  return k.keep[band * k.groups_per_band + j / k.width];
}

__global__ void update_kernel(WeightShape shape, CudaKeep keep, StridedWeight w, StridedWeight z, StridedWeight u,
                              StridedWeight mask, const int* bad, double* partial) {
  const bool leave = bad && *bad;
  const int64_t row = shape.row(), n = shape.filters * row;
  const int64_t begin = blockIdx.x * kCudaTile;
  const int64_t end = min(begin + kCudaTile, n);
  float* zs = static_cast<float*>(z.data);
  float* us = static_cast<float*>(u.data);
  double sums[5] = {};
  if (!leave) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const int64_t o = i / row, j = i % row;
      const int64_t zi = z.at(shape, o, j), ui = u.at(shape, o, j);
      const bool on = kept(keep, o, j) && (!mask.data || static_cast<const uint8_t*>(mask.data)[mask.at(shape, o, j)]);
      const float wv = load_float(w.data, w.dtype, w.at(shape, o, j));
      const float v = wv + us[ui];
      const float znew = on ? v : 0.0f;
      const float unew = v - znew;
      const float terms[5] = {wv - znew, znew - zs[zi], wv, znew, unew};
      for (int s = 0; s < 5; ++s) {
        const double t = terms[s];
        sums[s] = fma(t, t, sums[s]);
      }
      zs[zi] = znew;
      us[ui] = unew;
    }
  }
  // Warps, then the block, always in the same order.
  __shared__ double warp_sums[kThreads / 32][5];
  for (int s = 0; s < 5; ++s) {
    for (int half = 16; half > 0; half /= 2) sums[s] += __shfl_down_sync(0xffffffffu, sums[s], half);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][s] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x < 5) {
    double total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += warp_sums[warp][threadIdx.x];
    partial[blockIdx.x * 5 + threadIdx.x] = leave ? nan("") : total;
  }
}

// The tiles' sums, in order.
__global__ void total_kernel(const double* partial, int64_t tiles, double* sums) {
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += partial[t * 5 + threadIdx.x];
  sums[threadIdx.x] = total;
}

__global__ void penalty_kernel(WeightShape shape, StridedWeight g, StridedWeight w, StridedWeight z, StridedWeight u,
                               float rho) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= shape.filters * shape.row()) return;
  const int64_t o = i / shape.row(), j = i % shape.row();
  const float away =
      (load_float(w.data, w.dtype, w.at(shape, o, j)) - static_cast<const float*>(z.data)[z.at(shape, o, j)]) +
      static_cast<const float*>(u.data)[u.at(shape, o, j)];
  const int64_t gi = g.at(shape, o, j);
  store_float(g.data, g.dtype, gi, load_float(g.data, g.dtype, gi) + rho * away);
}

}  // namespace

int admm_update_cuda(const WeightShape& shape, const CudaKeep& keep, const StridedWeight& w, const StridedWeight& z,
                     const StridedWeight& u, const StridedWeight& mask, const int* bad, double* partial, double* sums,
                     void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned tiles = blocks_for(shape.filters * shape.row(), kCudaTile);
  update_kernel<<<tiles, kThreads, 0, s>>>(shape, keep, w, z, u, mask, bad, partial);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  total_kernel<<<1, 5, 0, s>>>(partial, tiles, sums);
  return cudaGetLastError();
}

int admm_penalty_cuda(const WeightShape& shape, const StridedWeight& g, const StridedWeight& w, const StridedWeight& z,
                      const StridedWeight& u, float rho, void* stream) {
  penalty_kernel<<<blocks_for(shape.filters * shape.row(), kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, g, w, z, u, rho);
  return cudaGetLastError();
}

}  // namespace structadmm
