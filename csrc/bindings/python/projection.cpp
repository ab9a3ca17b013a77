// _core: the training ops over NumPy arrays, strided ones too. What they compute: ops/group_project.h.
#include <pybind11/stl.h>

#include <vector>

#include "base/isa.h"
#include "bindings/python/adapter.h"
#include "bindings/python/bind.h"
#include "kernels/admm_update/admm_update.h"
#include "kernels/group_sumsq/group_sumsq.h"
#include "ops/group_project.h"

namespace structadmm::bindings {
namespace {

using Array = py::array;
using MaybeArray = std::optional<py::array>;

py::array_t<float> group_sumsq_np(const Array& w, const std::string& structure, int64_t conv_groups, int64_t block,
                                  const MaybeArray& u, const MaybeArray& mask) {
  constexpr const char* kOp = "group_sumsq";
  const TensorView wv = view_of(kOp, "w", w);
  const auto uv = view_of(kOp, "u", u), maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  py::array_t<float> scores(view.groups);
  float* out = scores.mutable_data();
  {
    py::gil_scoped_release release;
    group_sumsq(view, wv, pointer_to(uv), pointer_to(maskv), out, ThreadPool::global());
  }
  return scores;
}

py::array_t<bool> topk_keep_np(const Array& scores, int64_t k) {
  const TensorView v = view_of("topk_keep", "scores", scores);
  py::array_t<bool> keep(v.numel());
  bool* out = keep.mutable_data();
  {
    py::gil_scoped_release release;
    topk_keep(v, k, reinterpret_cast<uint8_t*>(out));
  }
  return keep;
}

py::tuple project_update_np(const Array& w, const Array& z, const Array& u, const std::string& structure, int64_t k,
                            int64_t conv_groups, int64_t block, const MaybeArray& mask) {
  constexpr const char* kOp = "project_update_";
  const TensorView wv = view_of(kOp, "w", w), zv = view_of(kOp, "z", z, true), uv = view_of(kOp, "u", u, true);
  const auto maskv = view_of(kOp, "mask", mask);
  const GroupView view = make_group_view(kOp, structure, wv, conv_groups, block);
  py::array_t<bool> keep(view.groups);
  py::array_t<double> sums(5);
  bool* keep_out = keep.mutable_data();
  double* sums_out = sums.mutable_data();
  {
    py::gil_scoped_release release;
    project_update_(view, wv, zv, uv, k, pointer_to(maskv), reinterpret_cast<uint8_t*>(keep_out), sums_out,
                    ThreadPool::global());
  }
  return py::make_tuple(keep, sums);
}

py::array_t<double> masked_update_np(const Array& w, const Array& z, const Array& u, const Array& mask) {
  constexpr const char* kOp = "masked_update_";
  const TensorView wv = view_of(kOp, "w", w), zv = view_of(kOp, "z", z, true), uv = view_of(kOp, "u", u, true),
                   maskv = view_of(kOp, "mask", mask);
  py::array_t<double> sums(5);
  double* out = sums.mutable_data();
  {
    py::gil_scoped_release release;
    masked_update_(wv, zv, uv, maskv, out, ThreadPool::global());
  }
  return sums;
}

void add_penalty_grad_np(const std::vector<Array>& grads, const std::vector<Array>& ws, const std::vector<Array>& zs,
                         const std::vector<Array>& us, const std::vector<double>& rhos) {
  constexpr const char* kOp = "add_penalty_grad_";
  const size_t n = grads.size();
  SADMM_CHECK(ws.size() == n && zs.size() == n && us.size() == n && rhos.size() == n, kOp, ": lists got ", n, ", ",
              ws.size(), ", ", zs.size(), ", ", us.size(), " and ", rhos.size(), " entries, wanted as many in each");
  std::vector<PenaltyLayer> layers;
  for (size_t i = 0; i < n; ++i) {
    layers.push_back({view_of(kOp, "grad", grads[i], true), view_of(kOp, "w", ws[i]), view_of(kOp, "z", zs[i]),
                      view_of(kOp, "u", us[i]), rhos[i]});
  }
  py::gil_scoped_release release;
  add_penalty_grad_(layers, ThreadPool::global());
}

// The name of the variant that a CPU with this instruction set would run.
std::string selected(const std::string& family, const std::string& isa, const std::string& dtype) {
  const auto which = isa_from_name(isa);
  SADMM_CHECK(which, "selected: isa got '", isa, "', wanted one of ", isa_names());
  Dtype type = Dtype::kOther;
  for (Dtype d : {Dtype::kF32, Dtype::kBf16, Dtype::kF16}) {
    if (dtype == dtype_name(d)) type = d;
  }
  if (family == "group_sumsq") return select_group_sumsq(*which, type).name;
  if (family == "admm_update") return select_admm_update(*which, type).name;
  fail("selected: family got '", family, "', wanted group_sumsq or admm_update");
}

}  // namespace

void bind_projection(py::module_& m) {
  using py::arg;
  m.def("group_sumsq", &group_sumsq_np, arg("w"), arg("structure"), arg("conv_groups") = 1, arg("block") = 8,
        arg("u") = py::none(), arg("mask") = py::none(), "float32 [n_groups]: sums of (w + u)^2 over groups and mask.");
  m.def("topk_keep", &topk_keep_np, arg("scores"), arg("k"), "bool [n], exactly k true; ties to the lower index.");
  m.def("project_update_", &project_update_np, arg("w"), arg("z"), arg("u"), arg("structure"), arg("k"),
        arg("conv_groups") = 1, arg("block") = 8, arg("mask") = py::none(),
        "Project w + u on the k largest groups into z, the rest into u; returns keep and the five residual sums.");
  m.def("masked_update_", &masked_update_np, arg("w"), arg("z"), arg("u"), arg("mask"),
        "project_update_ for a mask already known; returns the five residual sums.");
  m.def("add_penalty_grad_", &add_penalty_grad_np, arg("grads"), arg("ws"), arg("zs"), arg("us"), arg("rhos"),
        "grads[i] += rhos[i] * (ws[i] - zs[i] + us[i]).");
  m.def("selected_kernel", &selected, arg("family"), arg("isa"), arg("dtype"),
        "The name of the kernel that a CPU with this instruction set would run.");
}

}  // namespace structadmm::bindings
