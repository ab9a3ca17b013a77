// Stands in for cuda.cu in a build without nvcc.
#include "base/cuda_status.h"
#include "kernels/admm_update/cuda.h"

namespace structadmm {

int admm_update_cuda(const WeightShape&, const CudaKeep&, const StridedWeight&, const StridedWeight&,
                     const StridedWeight&, const StridedWeight&, const int*, double*, double*, void*) {
  return kBuiltWithoutCuda;
}

int admm_penalty_cuda(const WeightShape&, const StridedWeight&, const StridedWeight&, const StridedWeight&,
                      const StridedWeight&, float, void*) {
  return kBuiltWithoutCuda;
}

}  // namespace structadmm
