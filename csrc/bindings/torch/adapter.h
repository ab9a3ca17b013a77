// What the op families share at the border to torch: its tensors as the core's views, its threads behind the core's
// parallel interface.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "base/check.h"
#include "base/parallel.h"
#include "base/tensor_view.h"

namespace structadmm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kF32;
    case ScalarType::BFloat16:
      return Dtype::kBf16;
    case ScalarType::Half:
      return Dtype::kF16;
    case ScalarType::Double:
      return Dtype::kF64;
    case ScalarType::Bool:
      return Dtype::kBool;
    case ScalarType::Int:
      return Dtype::kI32;
    default:
      return Dtype::kOther;
  }
}

inline TensorView view_of(const char* op, const char* name, const Tensor& t) {
  TensorView v;
  v.dims = static_cast<int>(t.dim());
  SADMM_CHECK(v.dims <= kMaxDims, op, ": ", name, " got ", v.dims, " dimensions, wanted at most ", kMaxDims);
  v.data = t.data_ptr();
  v.dtype = dtype_of(t);
  v.device = t.is_cpu() ? Device::kCpu : t.is_cuda() ? Device::kCuda : Device::kOther;
  v.device_index = v.device == Device::kCpu ? 0 : t.get_device_index();
  const auto sizes = t.sizes(), strides = t.strides();
  for (int d = 0; d < v.dims; ++d) {
    v.sizes[d] = sizes[static_cast<size_t>(d)];
    v.strides[d] = strides[static_cast<size_t>(d)];
  }
  return v;
}

inline std::optional<TensorView> view_of(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return view_of(op, name, *t);
}

template <class T>
const T* pointer_to(const std::optional<T>& value) {
  return value ? &*value : nullptr;
}

// torch's own threads: torch.set_num_threads is obeyed, and inside a parallel region the caller does the work.
class TorchParallel final : public Parallel {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }

 protected:
  void run_tasks(int64_t n, const void* task, TaskFn fn) override {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(task, i);
    });
  }
};

}  // namespace structadmm::bindings
