#include "base/load.cuh"
#include "kernels/topk_keep/cuda.h"

namespace structadmm {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

__device__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One block: a radix selection by eight bits a round, then the ties are numbered in ascending order. Scores are few (a
// layer's groups), so what counts is that nothing waits for the host.
__global__ void topk_kernel(const float* scores, int64_t n, int64_t k, uint8_t* keep, int* bad) {
  __shared__ unsigned long long counts[256];
  __shared__ int64_t left;
  __shared__ uint32_t prefix;
  __shared__ int warp_ties[kWarps];

  int mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    mine |= (__float_as_uint(scores[i]) & 0x7f800000u) == 0x7f800000u;
  }
  const int any = __syncthreads_or(mine);
  if (threadIdx.x == 0) *bad = any;
  if (any || k == 0 || k == n) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) keep[i] = !any && k > 0;
    return;
  }

  if (threadIdx.x == 0) {
    left = k;
    prefix = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) counts[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t high = prefix;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = key_of(scores[i]);
      if (shift == 24 || key >> (shift + 8) == high) atomicAdd(&counts[key >> shift & 255], 1ull);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 255;
      for (; static_cast<int64_t>(counts[bin]) < left; --bin) left -= static_cast<int64_t>(counts[bin]);
      prefix = high << 8 | static_cast<uint32_t>(bin);
    }
    __syncthreads();
  }

  const uint32_t threshold = prefix;
  const int64_t room = left;
  int64_t before = 0;  // ties at lower indices
  for (int64_t begin = 0; begin < n; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const uint32_t key = i < n ? key_of(scores[i]) : 0;
    const bool tied = i < n && key == threshold;
    const unsigned ballot = __ballot_sync(0xffffffffu, tied);
    if (threadIdx.x % 32 == 0) warp_ties[threadIdx.x / 32] = __popc(ballot);
    __syncthreads();
    int64_t rank = before + __popc(ballot & ((1u << (threadIdx.x % 32)) - 1));
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < static_cast<int>(threadIdx.x / 32)) rank += warp_ties[warp];
      before += warp_ties[warp];
    }
    if (i < n) keep[i] = key > threshold || (tied && rank < room);
    __syncthreads();
  }
}

}  // namespace

int topk_keep_cuda(const float* scores, int64_t n, int64_t k, uint8_t* keep, int* bad, void* stream) {
  topk_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(scores, n, k, keep, bad);
  return cudaGetLastError();
}

int read_flag_cuda(const int* bad, int* value, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaMemcpyAsync(value, bad, sizeof(int), cudaMemcpyDeviceToHost, s);
  return status != cudaSuccess ? status : cudaStreamSynchronize(s);
}

}  // namespace structadmm
