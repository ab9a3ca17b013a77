// _core: conv2d_compact, linear_compact, conv2d_kernels over NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "bindings/python/bind.h"
#include "ops/conv_compact.h"
#include "ops/linear_compact.h"

namespace structadmm::bindings {
namespace {

namespace py = pybind11;
using Pair = std::array<int64_t, 2>;

TensorView view(const char* op, const char* name, const py::array& a) {
  TensorView v;
  v.dims = static_cast<int>(a.ndim());
  SADMM_CHECK(v.dims <= kMaxDims, op, ": ", name, " got ", v.dims, " dimensions, wanted at most ", kMaxDims);
  v.data = const_cast<void*>(a.data());
  v.dtype = py::isinstance<py::array_t<float>>(a)     ? Dtype::kF32
            : py::isinstance<py::array_t<int32_t>>(a) ? Dtype::kI32
                                                      : Dtype::kOther;
  for (int d = 0; d < v.dims; ++d) {
    v.sizes[d] = a.shape(d);
    SADMM_CHECK(a.strides(d) % a.itemsize() == 0, op, ": ", name, " got strides that are no multiples of its items");
    v.strides[d] = a.strides(d) / a.itemsize();
  }
  return v;
}

PackedBytes packed_bytes(const char* op, const py::array& weight, const std::optional<py::array>& bias,
                         const py::array& taps, const py::array& block_filters, const py::array& block_taps,
                         int64_t in_channels, const Pair& kernel, int64_t groups) {
  const std::optional<TensorView> b = bias ? std::optional(view(op, "bias", *bias)) : std::nullopt;
  return pack(op, tap_table(op, view(op, "weight", weight), b ? &*b : nullptr, view(op, "taps", taps),
                            view(op, "block_filters", block_filters), view(op, "block_taps", block_taps), in_channels,
                            kernel[0], kernel[1], groups));
}

Conv2dArgs args(const Pair& stride, const Pair& padding, const Pair& dilation) {
  return {
      .stride = {stride[0], stride[1]}, .padding = {padding[0], padding[1]}, .dilation = {dilation[0], dilation[1]}};
}

py::array_t<float> conv2d(const py::array& x, const py::array& weight, const std::optional<py::array>& bias,
                          const py::array& taps, const py::array& block_filters, const py::array& block_taps,
                          const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation,
                          int64_t groups) {
  constexpr auto op = "conv2d_compact";
  SADMM_CHECK(x.ndim() == 4, op, ": x got ", x.ndim(), " dimensions, wanted [batch, channels, height, width]");
  const auto bytes = packed_bytes(op, weight, bias, taps, block_filters, block_taps, x.shape(1), kernel, groups);
  const Packed packed = unpack(op, bytes);
  const Conv2dShape s = conv2d_shape(op, view(op, "x", x), Device::kCpu, packed.header->in_channels, kernel[0],
                                     kernel[1], args(stride, padding, dilation));
  py::array_t<float> y({s.batch, static_cast<int64_t>(packed.header->out_channels), s.out_h, s.out_w});
  float* out = y.mutable_data();
  const auto* in = static_cast<const float*>(x.data());
  py::gil_scoped_release release;
  conv2d_compact(s, in, packed, out, current_isa(), ThreadPool::global());
  return y;
}

py::array_t<float> linear(const py::array& x, const py::array& weight, const std::optional<py::array>& bias,
                          const py::array& taps, const py::array& block_filters, const py::array& block_taps) {
  constexpr auto op = "linear_compact";
  SADMM_CHECK(x.ndim() >= 1, op, ": x got a scalar, wanted [..., features]");
  const auto bytes = packed_bytes(op, weight, bias, taps, block_filters, block_taps, x.shape(x.ndim() - 1), {1, 1}, 1);
  const Packed packed = unpack(op, bytes);
  const LinearShape s = linear_shape(op, view(op, "x", x), Device::kCpu, packed.header->in_channels);
  std::vector<int64_t> sizes(x.shape(), x.shape() + x.ndim());
  sizes.back() = packed.header->out_channels;
  py::array_t<float> y(sizes);
  float* out = y.mutable_data();
  const auto* in = static_cast<const float*>(x.data());
  py::gil_scoped_release release;
  linear_compact(s, in, packed, out, current_isa(), ThreadPool::global());
  return y;
}

// Blocks with every tap.
std::vector<std::string> kernels_for(const std::string& isa, const std::array<int64_t, 4>& x,
                                     const std::vector<int32_t>& block_filters, const Pair& kernel, const Pair& stride,
                                     const Pair& padding, const Pair& dilation, int64_t groups) {
  constexpr auto op = "conv2d_kernels";
  const auto found = isa_from_name(isa);
  SADMM_CHECK(found, op, ": isa got '", isa, "', wanted one of ", isa_names());
  std::vector<int32_t> all, offsets{0};
  std::vector<float> weight;
  SADMM_CHECK(groups >= 1 && kernel[0] >= 1 && kernel[1] >= 1, op, ": groups and kernel_size got less than 1");
  const int64_t columns = x[1] / groups * kernel[0] * kernel[1];
  for (const int32_t filters : block_filters) {
    for (int64_t i = 0; i < columns; ++i) all.push_back(static_cast<int32_t>(i));
    offsets.push_back(static_cast<int32_t>(all.size()));
    weight.resize(weight.size() + static_cast<size_t>(std::max(filters, 0) * columns));
  }
  TapTable t;
  t.weight = weight;
  t.taps = all;
  t.block_filters = block_filters;
  t.block_taps = offsets;
  t.in_channels = x[1];
  t.kernel_size[0] = kernel[0];
  t.kernel_size[1] = kernel[1];
  t.conv_groups = groups;
  const auto bytes = pack(op, t);
  TensorView v;
  v.dtype = Dtype::kF32;
  v.dims = 4;
  int64_t next = 1;
  for (int d = 3; d >= 0; --d) {
    v.sizes[d] = x[static_cast<size_t>(d)];
    v.strides[d] = next;
    next *= v.sizes[d];
  }
  return conv2d_kernels(conv2d_shape(op, v, Device::kCpu, x[1], kernel[0], kernel[1], args(stride, padding, dilation)),
                        unpack(op, bytes), *found);
}

}  // namespace

void bind_compact(py::module_& m) {
  m.def("conv2d_compact", &conv2d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("taps"),
        py::arg("block_filters"), py::arg("block_taps"), py::arg("kernel_size"), py::arg("stride") = Pair{1, 1},
        py::arg("padding") = Pair{0, 0}, py::arg("dilation") = Pair{1, 1}, py::arg("groups") = 1,
        "2-d convolution of x, float32 [batch, channels, height, width], with a compacted weight.");
  m.def("linear_compact", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("taps"),
        py::arg("block_filters"), py::arg("block_taps"), "x [..., features] W^T + bias with a compacted weight.");
  m.def("conv2d_kernels", &kernels_for, py::arg("isa"), py::arg("x_shape"), py::arg("block_filters"),
        py::arg("kernel_size"), py::arg("stride") = Pair{1, 1}, py::arg("padding") = Pair{0, 0},
        py::arg("dilation") = Pair{1, 1}, py::arg("groups") = 1,
        "The kernels that an instruction set, which this CPU may lack, would use for blocks of so many filters.");
}

}  // namespace structadmm::bindings
