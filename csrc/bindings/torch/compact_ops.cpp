// conv2d_compact, linear_compact: a layer from its compacted weight as it is stored, packed at every call; and
// conv2d_pack, linear_pack, conv2d_packed, linear_packed: the same in two steps, for who keeps the packed form.
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/check.h"
#include "bindings/torch/adapter.h"
#include "ops/conv_compact.h"

namespace structadmm::bindings {
namespace {

using torch::headeronly::ScalarType;

template <class T>
std::span<const T> values(const char* op, const char* name, const Tensor& t) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr auto kType = kFloat ? ScalarType::Float : std::is_same_v<T, int32_t> ? ScalarType::Int : ScalarType::Byte;
  SADMM_CHECK(t.scalar_type() == kType, op, ": ", name, " got another dtype, wanted ",
              kFloat                       ? "float32"
              : std::is_same_v<T, int32_t> ? "int32"
                                           : "uint8");
  SADMM_CHECK(t.is_cpu(), op, ": ", name, " got a tensor on another device, wanted cpu");
  SADMM_CHECK(t.dim() == 1 && t.is_contiguous(), op, ": ", name, " got ", t.dim(),
              " dimensions or strides, wanted one, contiguous");
  return {static_cast<const T*>(t.const_data_ptr()), static_cast<size_t>(t.numel())};
}

TapTable table(const char* op, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& taps,
               const Tensor& block_filters, const Tensor& block_taps, int64_t in_channels, int64_t kernel_h,
               int64_t kernel_w, int64_t groups) {
  TapTable t;
  t.weight = values<float>(op, "weight", weight);
  t.has_bias = bias.has_value();
  if (bias) t.bias = values<float>(op, "bias", *bias);
  t.taps = values<int32_t>(op, "taps", taps);
  t.block_filters = values<int32_t>(op, "block_filters", block_filters);
  t.block_taps = values<int32_t>(op, "block_taps", block_taps);
  t.in_channels = in_channels;
  t.kernel_size[0] = kernel_h;
  t.kernel_size[1] = kernel_w;
  t.conv_groups = groups;
  return t;
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v) {
  SADMM_CHECK(v.size() == 2, op, ": ", name, " got ", v.size(), " numbers, wanted 2");
}

void check_input(const char* op, const Tensor& x) {
  SADMM_CHECK(x.is_cpu(), op, ": x got a tensor on another device, wanted cpu");
  SADMM_CHECK(x.scalar_type() == ScalarType::Float, op, ": x got another dtype, wanted float32");
}

void check_filters(const char* op, const char* name, int64_t got, const Packed& packed) {
  SADMM_CHECK(got == packed.header->out_channels, op, ": ", name, " got ", got, ", wanted the ",
              packed.header->out_channels, " filters of the weight");
}

Tensor run_conv(const char* op, const Tensor& x, const Packed& packed, int64_t out_channels,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation) {
  check_pair(op, "stride", stride);
  check_pair(op, "padding", padding);
  check_pair(op, "dilation", dilation);
  check_filters(op, "out_channels", out_channels, packed);
  const Conv2dShape s{.batch = x.size(0),
                      .channels = x.size(1),
                      .height = x.size(2),
                      .width = x.size(3),
                      .stride = {stride[0], stride[1]},
                      .padding = {padding[0], padding[1]},
                      .dilation = {dilation[0], dilation[1]}};
  const int64_t h = conv_out_size(op, s.height, packed.header->kernel_h, stride[0], padding[0], dilation[0]);
  const int64_t w = conv_out_size(op, s.width, packed.header->kernel_w, stride[1], padding[1], dilation[1]);
  Tensor y = torch::stable::new_empty(x, {s.batch, out_channels, h, w});
  TorchParallel parallel;
  conv2d_compact(op, s, static_cast<const float*>(x.const_data_ptr()),
                 {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, packed,
                 static_cast<float*>(y.mutable_data_ptr()), current_isa(), parallel);
  return y;
}

void check_image(const char* op, const Tensor& x) {
  check_input(op, x);
  SADMM_CHECK(x.dim() == 4, op, ": x got ", x.dim(), " dimensions, wanted 4 (batch, channels, height, width)");
}

Tensor run_linear(const char* op, const Tensor& x, const Packed& packed, int64_t out_features) {
  check_filters(op, "out_features", out_features, packed);
  const int64_t features = x.size(x.dim() - 1);
  int64_t rows = 1;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    rows *= x.size(i);
  }
  shape.push_back(out_features);
  const bool as_it_is = x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= features);
  const Tensor dense = as_it_is ? x : torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, shape);
  TorchParallel parallel;
  linear_compact(op, rows, features, static_cast<const float*>(dense.const_data_ptr()),
                 x.dim() == 2 ? dense.stride(0) : features, packed, static_cast<float*>(y.mutable_data_ptr()),
                 current_isa(), parallel);
  return y;
}

void check_rows(const char* op, const Tensor& x) {
  check_input(op, x);
  SADMM_CHECK(x.dim() >= 1, op, ": x got no dimension, wanted (..., features)");
}

Tensor to_tensor(const Tensor& like, const std::vector<std::byte>& bytes) {
  Tensor t = torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::memcpy(t.mutable_data_ptr(), bytes.data(), bytes.size());
  return t;
}

Tensor conv2d_pack(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                   int64_t in_channels, std::vector<int64_t> kernel_size, int64_t groups) {
  check_pair("conv2d_pack", "kernel_size", kernel_size);
  return to_tensor(weight, pack("conv2d_pack", table("conv2d_pack", weight, bias, taps, block_filters, block_taps,
                                                     in_channels, kernel_size[0], kernel_size[1], groups)));
}

Tensor linear_pack(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                   int64_t in_features) {
  return to_tensor(weight, pack("linear_pack", table("linear_pack", weight, bias, taps, block_filters, block_taps,
                                                     in_features, 1, 1, 1)));
}

Tensor conv2d_packed(Tensor x, Tensor packed, int64_t out_channels, std::vector<int64_t> kernel_size,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  constexpr auto op = "conv2d_packed";
  check_image(op, x);
  const Packed p = unpack(op, std::as_bytes(values<uint8_t>(op, "packed", packed)));
  check_pair(op, "kernel_size", kernel_size);
  SADMM_CHECK(kernel_size[0] == p.header->kernel_h && kernel_size[1] == p.header->kernel_w, op, ": kernel_size got (",
              kernel_size[0], ", ", kernel_size[1], "), wanted (", p.header->kernel_h, ", ", p.header->kernel_w, ")");
  return run_conv(op, x, p, out_channels, stride, padding, dilation);
}

Tensor linear_packed(Tensor x, Tensor packed, int64_t out_features) {
  constexpr auto op = "linear_packed";
  check_rows(op, x);
  return run_linear(op, x, unpack(op, std::as_bytes(values<uint8_t>(op, "packed", packed))), out_features);
}

Tensor conv2d_compact_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                          Tensor block_taps, int64_t out_channels, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups) {
  constexpr auto op = "conv2d_compact";
  check_image(op, x);
  check_pair(op, "kernel_size", kernel_size);
  const auto bytes = pack(
      op, table(op, weight, bias, taps, block_filters, block_taps, x.size(1), kernel_size[0], kernel_size[1], groups));
  return run_conv(op, x, unpack(op, bytes), out_channels, stride, padding, dilation);
}

Tensor linear_compact_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                          Tensor block_taps, int64_t out_features) {
  constexpr auto op = "linear_compact";
  check_rows(op, x);
  const auto bytes = pack(op, table(op, weight, bias, taps, block_filters, block_taps, x.size(x.dim() - 1), 1, 1, 1));
  return run_linear(op, x, unpack(op, bytes), out_features);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(structadmm, m) {
  m.def(
      "conv2d_compact(Tensor x, Tensor weight, Tensor? bias, Tensor taps, Tensor block_filters, Tensor block_taps, "
      "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def(
      "linear_compact(Tensor x, Tensor weight, Tensor? bias, Tensor taps, Tensor block_filters, Tensor block_taps, "
      "int out_features) -> Tensor");
  m.def(
      "conv2d_pack(Tensor weight, Tensor? bias, Tensor taps, Tensor block_filters, Tensor block_taps, int in_channels, "
      "int[2] kernel_size, int groups) -> Tensor");
  m.def(
      "linear_pack(Tensor weight, Tensor? bias, Tensor taps, Tensor block_filters, Tensor block_taps, int in_features) "
      "-> "
      "Tensor");
  m.def(
      "conv2d_packed(Tensor x, Tensor packed, int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  m.def("linear_packed(Tensor x, Tensor packed, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(structadmm, CPU, m) {
  m.impl("conv2d_compact", TORCH_BOX(&conv2d_compact_cpu));
  m.impl("linear_compact", TORCH_BOX(&linear_compact_cpu));
  m.impl("conv2d_pack", TORCH_BOX(&conv2d_pack));
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("conv2d_packed", TORCH_BOX(&conv2d_packed));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
}

}  // namespace structadmm::bindings
