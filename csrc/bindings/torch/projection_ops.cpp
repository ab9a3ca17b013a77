// The training ops: group norms, top-k, the fused Z/U update, the penalty gradient. What they compute:
// ops/group_project.h.
#include <string>
#include <tuple>
#include <vector>

#include "bindings/torch/adapter.h"
#include "bindings/torch/cuda_stream.h"
#include "ops/group_project.h"
#include "ops/group_project_cuda.h"

namespace structadmm::bindings {
namespace {

Tensor empty_on(const Tensor& like, int64_t n, ScalarType dtype) {
  return torch::stable::new_empty(like, {n}, dtype);
}

Tensor group_sumsq_cpu(Tensor w, std::string structure, int64_t conv_groups, int64_t block, std::optional<Tensor> u,
                       std::optional<Tensor> mask) {
  constexpr const char* kOp = "group_sumsq";
  const TensorView wv = view_of(kOp, "w", w);
  const auto uv = view_of(kOp, "u", u), maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  Tensor scores = empty_on(w, view.groups, ScalarType::Float);
  TorchParallel parallel;
  group_sumsq(view, wv, pointer_to(uv), pointer_to(maskv), static_cast<float*>(scores.data_ptr()), parallel);
  return scores;
}

Tensor topk_keep_cpu(Tensor scores, int64_t k) {
  const TensorView v = view_of("topk_keep", "scores", scores);
  Tensor keep = empty_on(scores, scores.numel(), ScalarType::Bool);
  topk_keep(v, k, static_cast<uint8_t*>(keep.data_ptr()));
  return keep;
}

std::tuple<Tensor, Tensor> project_update_cpu(Tensor w, Tensor z, Tensor u, std::string structure, int64_t k,
                                              int64_t conv_groups, int64_t block, std::optional<Tensor> mask) {
  constexpr const char* kOp = "project_update_";
  const TensorView wv = view_of(kOp, "w", w), zv = view_of(kOp, "z", z), uv = view_of(kOp, "u", u);
  const auto maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  Tensor keep = empty_on(w, view.groups, ScalarType::Bool), sums = empty_on(w, 5, ScalarType::Double);
  TorchParallel parallel;
  project_update_(view, wv, zv, uv, k, pointer_to(maskv), static_cast<uint8_t*>(keep.data_ptr()),
                  static_cast<double*>(sums.data_ptr()), parallel);
  return {keep, sums};
}

Tensor masked_update_cpu(Tensor w, Tensor z, Tensor u, Tensor mask) {
  constexpr const char* kOp = "masked_update_";
  Tensor sums = empty_on(w, 5, ScalarType::Double);
  TorchParallel parallel;
  masked_update_(view_of(kOp, "w", w), view_of(kOp, "z", z), view_of(kOp, "u", u), view_of(kOp, "mask", mask),
                 static_cast<double*>(sums.data_ptr()), parallel);
  return sums;
}

std::vector<PenaltyLayer> penalty_layers(const std::vector<Tensor>& grads, const std::vector<Tensor>& ws,
                                         const std::vector<Tensor>& zs, const std::vector<Tensor>& us,
                                         const std::vector<double>& rhos) {
  constexpr const char* kOp = "add_penalty_grad_";
  const size_t n = grads.size();
  SADMM_CHECK(ws.size() == n && zs.size() == n && us.size() == n && rhos.size() == n, kOp, ": lists got ", n, ", ",
              ws.size(), ", ", zs.size(), ", ", us.size(), " and ", rhos.size(), " entries, wanted as many in each");
  std::vector<PenaltyLayer> layers;
  layers.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    layers.push_back({view_of(kOp, "grad", grads[i]), view_of(kOp, "w", ws[i]), view_of(kOp, "z", zs[i]),
                      view_of(kOp, "u", us[i]), rhos[i]});
  }
  return layers;
}

void add_penalty_grad_cpu(std::vector<Tensor> grads, std::vector<Tensor> ws, std::vector<Tensor> zs,
                          std::vector<Tensor> us, std::vector<double> rhos) {
  TorchParallel parallel;
  add_penalty_grad_(penalty_layers(grads, ws, zs, us, rhos), parallel);
}

// The CUDA side: on torch's current stream, with workspace from torch's allocator.

using torch::stable::accelerator::DeviceGuard;

Tensor group_sumsq_gpu(Tensor w, std::string structure, int64_t conv_groups, int64_t block, std::optional<Tensor> u,
                       std::optional<Tensor> mask) {
  constexpr const char* kOp = "group_sumsq";
  const TensorView wv = view_of(kOp, "w", w);
  const auto uv = view_of(kOp, "u", u), maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  const DeviceGuard guard(wv.device_index);
  Tensor scores = empty_on(w, view.groups, ScalarType::Float);
  Tensor space = empty_on(w, project_workspace_cuda(view), ScalarType::Byte);
  group_sumsq_cuda(view, wv, pointer_to(uv), pointer_to(maskv), static_cast<float*>(scores.data_ptr()),
                   space.data_ptr(), current_cuda_stream(kOp, wv.device_index));
  return scores;
}

Tensor topk_keep_gpu(Tensor scores, int64_t k) {
  const TensorView v = view_of("topk_keep", "scores", scores);
  const DeviceGuard guard(v.device_index);
  Tensor keep = empty_on(scores, scores.numel(), ScalarType::Bool), space = empty_on(scores, 8, ScalarType::Byte);
  topk_keep_cuda(v, k, static_cast<uint8_t*>(keep.data_ptr()), space.data_ptr(),
                 current_cuda_stream("topk_keep", v.device_index));
  return keep;
}

std::tuple<Tensor, Tensor> project_update_gpu(Tensor w, Tensor z, Tensor u, std::string structure, int64_t k,
                                              int64_t conv_groups, int64_t block, std::optional<Tensor> mask) {
  constexpr const char* kOp = "project_update_";
  const TensorView wv = view_of(kOp, "w", w), zv = view_of(kOp, "z", z), uv = view_of(kOp, "u", u);
  const auto maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  const DeviceGuard guard(wv.device_index);
  Tensor keep = empty_on(w, view.groups, ScalarType::Bool), sums = empty_on(w, 5, ScalarType::Double);
  Tensor space = empty_on(w, project_workspace_cuda(view), ScalarType::Byte);
  project_update_cuda(view, wv, zv, uv, k, pointer_to(maskv), static_cast<uint8_t*>(keep.data_ptr()),
                      static_cast<double*>(sums.data_ptr()), space.data_ptr(),
                      current_cuda_stream(kOp, wv.device_index));
  return {keep, sums};
}

Tensor masked_update_gpu(Tensor w, Tensor z, Tensor u, Tensor mask) {
  constexpr const char* kOp = "masked_update_";
  const TensorView wv = view_of(kOp, "w", w);
  const DeviceGuard guard(wv.device_index);
  Tensor sums = empty_on(w, 5, ScalarType::Double), space = empty_on(w, masked_workspace_cuda(wv), ScalarType::Byte);
  masked_update_cuda(wv, view_of(kOp, "z", z), view_of(kOp, "u", u), view_of(kOp, "mask", mask),
                     static_cast<double*>(sums.data_ptr()), space.data_ptr(),
                     current_cuda_stream(kOp, wv.device_index));
  return sums;
}

void add_penalty_grad_gpu(std::vector<Tensor> grads, std::vector<Tensor> ws, std::vector<Tensor> zs,
                          std::vector<Tensor> us, std::vector<double> rhos) {
  constexpr const char* kOp = "add_penalty_grad_";
  const auto layers = penalty_layers(grads, ws, zs, us, rhos);
  if (layers.empty()) return;
  const int device = layers[0].g.device_index;
  for (const PenaltyLayer& l : layers) {
    SADMM_CHECK(l.w.device_index == device, kOp, ": lists got layers on several devices, wanted one device a call");
  }
  const DeviceGuard guard(device);
  add_penalty_grad_cuda(layers, current_cuda_stream(kOp, device));
}

}  // namespace
}  // namespace structadmm::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(structadmm, m) {
  m.def(
      "group_sumsq(Tensor w, str structure, int conv_groups=1, int block=8, Tensor? u=None, Tensor? mask=None)"
      " -> Tensor");
  m.def("topk_keep(Tensor scores, int k) -> Tensor");
  m.def(
      "project_update_(Tensor w, Tensor(a!) z, Tensor(b!) u, str structure, int k, int conv_groups=1, int block=8,"
      " Tensor? mask=None) -> (Tensor, Tensor)");
  m.def("masked_update_(Tensor w, Tensor(a!) z, Tensor(b!) u, Tensor mask) -> Tensor");
  m.def("add_penalty_grad_(Tensor(a!)[] grads, Tensor[] ws, Tensor[] zs, Tensor[] us, float[] rhos) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(structadmm, CPU, m) {
  using namespace structadmm::bindings;
  m.impl("group_sumsq", TORCH_BOX(&group_sumsq_cpu));
  m.impl("topk_keep", TORCH_BOX(&topk_keep_cpu));
  m.impl("project_update_", TORCH_BOX(&project_update_cpu));
  m.impl("masked_update_", TORCH_BOX(&masked_update_cpu));
  m.impl("add_penalty_grad_", TORCH_BOX(&add_penalty_grad_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(structadmm, CUDA, m) {
  using namespace structadmm::bindings;
  m.impl("group_sumsq", TORCH_BOX(&group_sumsq_gpu));
  m.impl("topk_keep", TORCH_BOX(&topk_keep_gpu));
  m.impl("project_update_", TORCH_BOX(&project_update_gpu));
  m.impl("masked_update_", TORCH_BOX(&masked_update_gpu));
  m.impl("add_penalty_grad_", TORCH_BOX(&add_penalty_grad_gpu));
}
