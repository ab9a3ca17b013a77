// The training ops over tensors on the CPU: validate once, divide into tiles, hand the tiles to the kernels in
// parallel. What each computes is in kernels/group_sumsq, kernels/topk_keep and kernels/admm_update; group numbers in
// group_view.h.
//
// W is f32, bf16 or f16; U and Z are f32, mask is bool, all of W's shape. Any strides: tensors whose rows are dense in
// the same order (contiguous or channels-last) are used in place, others go through tiles gathered to a stack buffer.
// Results do not depend on the number of threads: threads divide groups and tiles, never a sum; the sums of tiles are
// added in order. On an Error nothing has been written.
#pragma once

#include <cstdint>
#include <vector>

#include "base/parallel.h"
#include "base/tensor_view.h"
#include "ops/group_view.h"

namespace structadmm {

// scores: [view.groups]. u and mask may be null.
void group_sumsq(const GroupView& view, const TensorView& w, const TensorView* u, const TensorView* mask, float* scores,
                 Parallel& parallel);

// scores: f32 [n], contiguous. keep: [n].
void topk_keep(const TensorView& scores, int64_t k, uint8_t* keep);

// z and u are overwritten. keep: [view.groups]. sums: ||W - Z'||^2, ||Z' - Z||^2, ||W||^2, ||Z'||^2, ||U'||^2.
void project_update_(const GroupView& view, const TensorView& w, const TensorView& z, const TensorView& u, int64_t k,
                     const TensorView* mask, uint8_t* keep, double sums[5], Parallel& parallel);

void masked_update_(const TensorView& w, const TensorView& z, const TensorView& u, const TensorView& mask,
                    double sums[5], Parallel& parallel);

struct PenaltyLayer {
  TensorView g, w, z, u;
  double rho;
};

void add_penalty_grad_(const std::vector<PenaltyLayer>& layers, Parallel& parallel);

// The checks alone, for what runs elsewhere (the CUDA kernels): dtypes, shapes, devices, aliasing. Null tensors are
// absent.
void check_operands(const char* op, const TensorView& w, const TensorView* z, const TensorView* u,
                    const TensorView* mask);
void check_k(const char* op, int64_t k, int64_t groups);
void check_penalty(const std::vector<PenaltyLayer>& layers);

}  // namespace structadmm
