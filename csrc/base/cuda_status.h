// What a CUDA launcher returns: 0, a cudaError_t, or kBuiltWithoutCuda from a stub.
#pragma once

#include <string>

namespace structadmm {

inline constexpr int kBuiltWithoutCuda = -1;

std::string cuda_status_text(int status);

// Throws Error, naming the op, unless the status is 0.
void check_cuda(const char* op, int status);

}  // namespace structadmm
