// What the families share at the border to NumPy: arrays as the core's views.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "base/check.h"
#include "base/tensor_view.h"

namespace structadmm::bindings {

namespace py = pybind11;

inline Dtype dtype_of(const py::array& a) {
  const py::dtype type = a.dtype();
  if (type.byteorder() == '>') return Dtype::kOther;  // on the little-endian machines that this runs on
  const auto size = type.itemsize();
  switch (type.kind()) {
    case 'f':
      return size == 4 ? Dtype::kF32 : size == 2 ? Dtype::kF16 : size == 8 ? Dtype::kF64 : Dtype::kOther;
    case 'b':
      return Dtype::kBool;
    case 'i':
      return size == 4 ? Dtype::kI32 : Dtype::kOther;
    // NumPy has no bfloat16 of its own; the ml_dtypes package adds one under that name.
    default:
      return py::str(type).cast<std::string>() == "bfloat16" ? Dtype::kBf16 : Dtype::kOther;
  }
}

// `written`: the array must be writable.
inline TensorView view_of(const char* op, const char* name, const py::array& a, bool written = false) {
  TensorView v;
  v.dims = static_cast<int>(a.ndim());
  v.dtype = dtype_of(a);
  SADMM_CHECK(v.dims <= kMaxDims, op, ": ", name, " got ", v.dims, " dimensions, wanted at most ", kMaxDims);
  SADMM_CHECK(v.dtype != Dtype::kOther, op, ": ", name, " got dtype ", py::str(a.dtype()).cast<std::string>(),
              ", wanted a native float, bool or int32 dtype");
  SADMM_CHECK(!written || a.writeable(), op, ": ", name, " got a read-only array, wanted a writable one");
  v.data = const_cast<void*>(a.data());
  const int64_t size = dtype_size(v.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(size) == 0;
  for (int d = 0; d < v.dims; ++d) {
    v.sizes[d] = a.shape(d);
    v.strides[d] = a.strides(d) / size;
    aligned = aligned && a.strides(d) % size == 0;
  }
  SADMM_CHECK(aligned, op, ": ", name, " got an array that is not aligned to its elements, wanted an aligned one");
  return v;
}

inline std::optional<TensorView> view_of(const char* op, const char* name, const std::optional<py::array>& a) {
  if (!a) return std::nullopt;
  return view_of(op, name, *a);
}

template <class T>
const T* pointer_to(const std::optional<T>& value) {
  return value ? &*value : nullptr;
}

}  // namespace structadmm::bindings
