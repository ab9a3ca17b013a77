// Stands in for cuda.cu in a build without nvcc.
#include "base/cuda_status.h"
#include "kernels/group_sumsq/cuda.h"

namespace structadmm {

int group_sumsq_cells_cuda(const WeightShape&, const CudaBands&, const StridedWeight&, const StridedWeight&,
                           const StridedWeight&, float*, void*) {
  return kBuiltWithoutCuda;
}

int group_sumsq_fold_cuda(const float*, int64_t, int64_t, float*, void*) {
  return kBuiltWithoutCuda;
}

int group_sumsq_rows_cuda(const WeightShape&, bool, const StridedWeight&, const StridedWeight&, const StridedWeight&,
                          float*, void*) {
  return kBuiltWithoutCuda;
}

}  // namespace structadmm
