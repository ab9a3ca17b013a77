// Loads and stores of the storage types in CUDA code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "base/strided.h"

namespace structadmm {
namespace {

__device__ inline float load_float(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case Dtype::kF16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_float(void* data, Dtype dtype, int64_t i, float x) {
  switch (dtype) {
    case Dtype::kBf16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
      break;
    case Dtype::kF16:
      static_cast<__half*>(data)[i] = __float2half_rn(x);
      break;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

inline unsigned blocks_for(int64_t n, int threads) {
  return static_cast<unsigned>((n + threads - 1) / threads);
}

}  // namespace
}  // namespace structadmm
