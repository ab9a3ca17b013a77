#include "base/cuda_status.h"

#include "base/check.h"

#if SADMM_CUDA
#include <cuda_runtime_api.h>
#endif

namespace structadmm {

std::string cuda_status_text(int status) {
  if (status == kBuiltWithoutCuda) {
    return "built without CUDA: got a CUDA tensor, wanted a CPU one, or a structadmm that was installed where nvcc is "
           "found";
  }
#if SADMM_CUDA
  return std::string("CUDA error: ") + cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return "CUDA error " + std::to_string(status);
#endif
}

void check_cuda(const char* op, int status) {
  SADMM_CHECK(status == 0, op, ": ", cuda_status_text(status));
}

}  // namespace structadmm
