// The training ops over CUDA tensors: the checks and numbering of group_project.h, then launches on the given stream.
// All pointers but the views' structs are on the device. Only topk_keep_cuda waits for the device; project_update_cuda
// instead leaves z and u as they are and makes the sums NaN where a norm is NaN or infinite.
#pragma once

#include <vector>

#include "ops/group_project.h"

namespace structadmm {

// Bytes of device memory that the ops below want as workspace, 8-byte aligned.
int64_t project_workspace_cuda(const GroupView& view);
int64_t masked_workspace_cuda(const TensorView& w);

void group_sumsq_cuda(const GroupView& view, const TensorView& w, const TensorView* u, const TensorView* mask,
                      float* scores, void* workspace, void* stream);
void topk_keep_cuda(const TensorView& scores, int64_t k, uint8_t* keep, void* workspace, void* stream);
void project_update_cuda(const GroupView& view, const TensorView& w, const TensorView& z, const TensorView& u,
                         int64_t k, const TensorView* mask, uint8_t* keep, double* sums, void* workspace, void* stream);
void masked_update_cuda(const TensorView& w, const TensorView& z, const TensorView& u, const TensorView& mask,
                        double* sums, void* workspace, void* stream);
void add_penalty_grad_cuda(const std::vector<PenaltyLayer>& layers, void* stream);

}  // namespace structadmm
