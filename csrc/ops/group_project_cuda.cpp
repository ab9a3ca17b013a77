#include "ops/group_project_cuda.h"

#include "base/check.h"
#include "base/cuda_status.h"
#include "base/strided.h"
#include "kernels/admm_update/cuda.h"
#include "kernels/group_sumsq/cuda.h"
#include "kernels/topk_keep/cuda.h"

namespace structadmm {
namespace {

WeightShape shape_of(const char* op, const TensorView& w) {
  SADMM_CHECK(w.dims <= 5, op, ": w got ", w.dims, " dimensions, wanted at most 5 on CUDA");
  WeightShape shape{w.sizes[0], w.dims > 1 ? w.sizes[1] : 1, {1, 1, 1}};
  for (int d = 2; d < w.dims; ++d) shape.kernel[d - 2] = w.sizes[d];
  return shape;
}

StridedWeight strided(const TensorView* t) {
  StridedWeight s{};
  if (!t) return s;
  s.data = t->data;
  s.dtype = t->dtype;
  s.dense = make_rows(*t).logical;
  s.row_stride = t->strides[0];
  s.channel_stride = t->dims > 1 ? t->strides[1] : 0;
  for (int d = 2; d < t->dims; ++d) s.kernel_stride[d - 2] = t->strides[d];
  return s;
}

int64_t tiles_of(int64_t weights) {
  return (weights + kCudaTile - 1) / kCudaTile;
}

// Parts of the workspace, the most aligned first.
struct Workspace {
  double* partial;
  float* scores;
  float* cells;
  int* bad;
};

int64_t cells_of(const GroupView& view) {
  return view.structure == Structure::kChannel ? view.bands * view.row : 0;
}

Workspace carve(const GroupView& view, void* memory) {
  Workspace w;
  w.partial = static_cast<double*>(memory);
  w.scores = reinterpret_cast<float*>(w.partial + 5 * tiles_of(view.filters * view.row));
  w.cells = w.scores + view.groups;
  w.bad = reinterpret_cast<int*>(w.cells + cells_of(view));
  return w;
}

void launch_scores(const char* op, const GroupView& view, const TensorView& w, const TensorView* u,
                   const TensorView* mask, float* scores, float* cells, void* stream) {
  const WeightShape shape = shape_of(op, w);
  const StridedWeight ws = strided(&w), us = strided(u), masks = strided(mask);
  if (view.structure == Structure::kFilter) {
    const Rows rows = make_rows(w);
    return check_cuda(op,
                      group_sumsq_rows_cuda(shape, !rows.logical && rows.channels_last, ws, us, masks, scores, stream));
  }
  const CudaBands bands{view.group_filters, view.band_filters, view.bands_per_group, view.bands};
  const bool fold = view.structure == Structure::kChannel;
  check_cuda(op, group_sumsq_cells_cuda(shape, bands, ws, us, masks, fold ? cells : scores, stream));
  if (fold) check_cuda(op, group_sumsq_fold_cuda(cells, view.groups, view.taps, scores, stream));
}

}  // namespace

int64_t project_workspace_cuda(const GroupView& view) {
  return 8 * 5 * tiles_of(view.filters * view.row) + 4 * (view.groups + cells_of(view)) + 8;
}

int64_t masked_workspace_cuda(const TensorView& w) {
  return 8 * 5 * tiles_of(w.numel());
}

void group_sumsq_cuda(const GroupView& view, const TensorView& w, const TensorView* u, const TensorView* mask,
                      float* scores, void* workspace, void* stream) {
  check_operands("group_sumsq", w, nullptr, u, mask);
  launch_scores("group_sumsq", view, w, u, mask, scores, carve(view, workspace).cells, stream);
}

void topk_keep_cuda(const TensorView& scores, int64_t k, uint8_t* keep, void* workspace, void* stream) {
  constexpr const char* kOp = "topk_keep";
  SADMM_CHECK(scores.dtype == Dtype::kF32, kOp, ": scores got ", dtype_name(scores.dtype), ", wanted f32");
  SADMM_CHECK(scores.dims == 1 && (scores.strides[0] == 1 || scores.sizes[0] <= 1), kOp, ": scores got shape ",
              scores.shape(), " with strides, wanted one contiguous dimension on CUDA");
  check_k(kOp, k, scores.sizes[0]);
  int* flag = static_cast<int*>(workspace);
  int bad = 0;
  check_cuda(kOp, topk_keep_cuda(static_cast<const float*>(scores.data), scores.sizes[0], k, keep, flag, stream));
  check_cuda(kOp, read_flag_cuda(flag, &bad, stream));
  SADMM_CHECK(!bad, kOp, ": scores got NaN or infinite values, wanted finite values");
}

void project_update_cuda(const GroupView& view, const TensorView& w, const TensorView& z, const TensorView& u,
                         int64_t k, const TensorView* mask, uint8_t* keep, double* sums, void* workspace,
                         void* stream) {
  constexpr const char* kOp = "project_update_";
  check_operands(kOp, w, &z, &u, mask);
  check_k(kOp, k, view.groups);
  const Workspace space = carve(view, workspace);
  launch_scores(kOp, view, w, &u, mask, space.scores, space.cells, stream);
  check_cuda(kOp, topk_keep_cuda(space.scores, view.groups, k, keep, space.bad, stream));
  CudaKeep kept{keep, view.group_filters, view.band_filters, view.bands_per_group, view.row, 1};
  if (view.structure == Structure::kFilter) {
    kept.groups_per_band = 1;
    kept.width = view.row;
  } else if (view.structure == Structure::kChannel) {
    kept.groups_per_band = view.channels;
    kept.width = view.taps;
  }
  check_cuda(kOp, admm_update_cuda(shape_of(kOp, w), kept, strided(&w), strided(&z), strided(&u), strided(mask),
                                   space.bad, space.partial, sums, stream));
}

void masked_update_cuda(const TensorView& w, const TensorView& z, const TensorView& u, const TensorView& mask,
                        double* sums, void* workspace, void* stream) {
  constexpr const char* kOp = "masked_update_";
  check_operands(kOp, w, &z, &u, &mask);
  check_cuda(kOp, admm_update_cuda(shape_of(kOp, w), CudaKeep{}, strided(&w), strided(&z), strided(&u), strided(&mask),
                                   nullptr, static_cast<double*>(workspace), sums, stream));
}

void add_penalty_grad_cuda(const std::vector<PenaltyLayer>& layers, void* stream) {
  constexpr const char* kOp = "add_penalty_grad_";
  check_penalty(layers);
  for (const PenaltyLayer& l : layers) {
    check_cuda(kOp, admm_penalty_cuda(shape_of(kOp, l.w), strided(&l.g), strided(&l.w), strided(&l.z), strided(&l.u),
                                      static_cast<float>(l.rho), stream));
  }
}

}  // namespace structadmm
