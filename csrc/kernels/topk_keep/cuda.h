// topk_keep on the GPU (topk_keep.h). *bad becomes 1 if a score is NaN or infinite, and keep all zero; otherwise 0. All
// pointers are on the device. Returns a status (base/cuda_status.h) and waits for nothing.
#pragma once

#include <cstdint>

namespace structadmm {

int topk_keep_cuda(const float* scores, int64_t n, int64_t k, uint8_t* keep, int* bad, void* stream);

// Waits for the stream and gives *bad.
int read_flag_cuda(const int* bad, int* value, void* stream);

}  // namespace structadmm
