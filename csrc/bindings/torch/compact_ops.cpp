// conv2d_compact, linear_compact: a layer from its compacted weight as it is stored, packed at every call; and
// conv2d_pack, linear_pack, conv2d_packed, linear_packed: the same in two steps, for who keeps the packed form.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/isa.h"
#include "bindings/torch/adapter.h"
#include "bindings/torch/cuda_stream.h"
#include "ops/compact_cuda.h"
#include "ops/conv_compact.h"
#include "ops/linear_compact.h"

namespace structadmm::bindings {
namespace {

// An f32 tensor on the CPU through the C shim: half the time of torch::stable::empty, which finds its op by name.
Tensor empty_f32(std::span<const int64_t> sizes) {
  int64_t strides[kMaxDims], next = 1;
  for (size_t d = sizes.size(); d-- > 0; next *= sizes[d]) strides[d] = next;
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                               aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle);
  SADMM_CHECK(status == 0, "empty: sizes got no memory, wanted room for the output");
  return Tensor(handle);
}

TapTable table(const char* op, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& taps,
               const Tensor& block_filters, const Tensor& block_taps, int64_t in_channels, int64_t kernel_h,
               int64_t kernel_w, int64_t groups) {
  const auto bias_view = view_of(op, "bias", bias);
  return tap_table(op, view_of(op, "weight", weight), pointer_to(bias_view), view_of(op, "taps", taps),
                   view_of(op, "block_filters", block_filters), view_of(op, "block_taps", block_taps), in_channels,
                   kernel_h, kernel_w, groups);
}

std::span<const std::byte> bytes_of(const char* op, const Tensor& packed) {
  SADMM_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_cpu() && packed.is_contiguous(), op,
              ": packed got another tensor, wanted what ", op[0] == 'c' ? "conv2d_pack" : "linear_pack", " returned");
  return {static_cast<const std::byte*>(packed.data_ptr()), static_cast<size_t>(packed.numel())};
}

Tensor to_tensor(const Tensor& like, const PackedBytes& bytes) {
  Tensor t = torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::memcpy(t.data_ptr(), bytes.data(), bytes.size());
  return t;
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v) {
  SADMM_CHECK(v.size() == 2, op, ": ", name, " got ", v.size(), " numbers, wanted 2");
}

void check_filters(const char* op, const char* name, int64_t got, const Packed& packed) {
  SADMM_CHECK(got == packed.header->out_channels, op, ": ", name, " got ", got, ", wanted the ",
              packed.header->out_channels, " filters of the weight");
}

Tensor run_conv(const char* op, const Tensor& x, const Packed& packed, int64_t out_channels, const Conv2dArgs& args) {
  const PackedHeader& h = *packed.header;
  const Conv2dShape s =
      conv2d_shape(op, view_of(op, "x", x), Device::kCpu, h.in_channels, h.kernel_h, h.kernel_w, args);
  check_filters(op, "out_channels", out_channels, packed);
  const int64_t sizes[] = {s.batch, out_channels, s.out_h, s.out_w};
  Tensor y = empty_f32(sizes);
  TorchParallel parallel;
  conv2d_compact(s, static_cast<const float*>(x.data_ptr()), packed, static_cast<float*>(y.data_ptr()), current_isa(),
                 parallel);
  return y;
}

// x, or a copy of it, with contiguous rows.
Tensor with_rows(const Tensor& x) {
  const bool rows = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= x.size(1);
  return rows || x.is_contiguous() ? x : torch::stable::contiguous(x);
}

Tensor run_linear(const char* op, const Tensor& any, const Packed& packed, int64_t out_features) {
  const Tensor x = with_rows(any);
  TensorView view = view_of(op, "x", x);
  const LinearShape s = linear_shape(op, view, Device::kCpu, packed.header->in_channels);
  check_filters(op, "out_features", out_features, packed);
  view.sizes[view.dims - 1] = out_features;
  Tensor y = empty_f32({view.sizes, static_cast<size_t>(view.dims)});
  TorchParallel parallel;
  linear_compact(s, static_cast<const float*>(x.data_ptr()), packed, static_cast<float*>(y.data_ptr()), current_isa(),
                 parallel);
  return y;
}

Tensor conv2d_pack(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                   int64_t in_channels, std::vector<int64_t> kernel_size, int64_t groups) {
  constexpr auto op = "conv2d_pack";
  check_pair(op, "kernel_size", kernel_size);
  return to_tensor(weight, pack(op, table(op, weight, bias, taps, block_filters, block_taps, in_channels,
                                          kernel_size[0], kernel_size[1], groups)));
}

Tensor linear_pack(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                   int64_t in_features) {
  constexpr auto op = "linear_pack";
  return to_tensor(weight, pack(op, table(op, weight, bias, taps, block_filters, block_taps, in_features, 1, 1, 1)));
}

Tensor conv2d_packed(Tensor x, Tensor packed, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                     int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                     int64_t dilation_w) {
  constexpr auto op = "conv2d_packed";
  const Packed p = unpack(op, bytes_of(op, packed));
  SADMM_CHECK(kernel_h == p.header->kernel_h && kernel_w == p.header->kernel_w, op, ": kernel_size got (", kernel_h,
              ", ", kernel_w, "), wanted (", p.header->kernel_h, ", ", p.header->kernel_w, ")");
  return run_conv(
      op, x, p, out_channels,
      {.stride = {stride_h, stride_w}, .padding = {padding_h, padding_w}, .dilation = {dilation_h, dilation_w}});
}

Tensor linear_packed(Tensor x, Tensor packed, int64_t out_features) {
  constexpr auto op = "linear_packed";
  return run_linear(op, x, unpack(op, bytes_of(op, packed)), out_features);
}

Tensor conv2d_compact_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                          Tensor block_taps, int64_t out_channels, std::vector<int64_t> kernel_size,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups) {
  constexpr auto op = "conv2d_compact";
  SADMM_CHECK(x.dim() == 4, op, ": x got ", x.dim(), " dimensions, wanted [batch, channels, height, width]");
  check_pair(op, "kernel_size", kernel_size);
  check_pair(op, "stride", stride);
  check_pair(op, "padding", padding);
  check_pair(op, "dilation", dilation);
  const auto bytes = pack(
      op, table(op, weight, bias, taps, block_filters, block_taps, x.size(1), kernel_size[0], kernel_size[1], groups));
  return run_conv(
      op, x, unpack(op, bytes), out_channels,
      {.stride = {stride[0], stride[1]}, .padding = {padding[0], padding[1]}, .dilation = {dilation[0], dilation[1]}});
}

Tensor linear_compact_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                          Tensor block_taps, int64_t out_features) {
  constexpr auto op = "linear_compact";
  SADMM_CHECK(x.dim() >= 1, op, ": x got a scalar, wanted [..., features]");
  const auto bytes = pack(op, table(op, weight, bias, taps, block_filters, block_taps, x.size(x.dim() - 1), 1, 1, 1));
  return run_linear(op, x, unpack(op, bytes), out_features);
}

// The CUDA side: packed on the CPU, copied to the device of x, run on torch's current stream.
const torch::stable::Device kCpu{torch::headeronly::DeviceType::CPU};

Tensor to_cpu(const Tensor& t) {
  return t.is_cpu() ? t : torch::stable::contiguous(torch::stable::to(t, kCpu));
}

std::optional<Tensor> to_cpu(const std::optional<Tensor>& t) {
  return t ? std::optional(to_cpu(*t)) : std::nullopt;
}

Tensor conv2d_pack_cuda(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                        int64_t in_channels, std::vector<int64_t> kernel_size, int64_t groups) {
  return torch::stable::to(conv2d_pack(to_cpu(weight), to_cpu(bias), to_cpu(taps), to_cpu(block_filters),
                                       to_cpu(block_taps), in_channels, kernel_size, groups),
                           weight.device());
}

Tensor linear_pack_cuda(Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters, Tensor block_taps,
                        int64_t in_features) {
  return torch::stable::to(
      linear_pack(to_cpu(weight), to_cpu(bias), to_cpu(taps), to_cpu(block_filters), to_cpu(block_taps), in_features),
      weight.device());
}

void check_device(const char* op, const Tensor& x, const Tensor& packed) {
  SADMM_CHECK(packed.is_cuda() && packed.get_device_index() == x.get_device_index(), op,
              ": packed got a tensor on another device, wanted that of x");
  SADMM_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                  packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
              op, ": packed got another tensor, wanted what the pack op returned");
}

Tensor conv2d_packed_cuda(Tensor x, Tensor packed, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                          int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                          int64_t dilation_w) {
  constexpr auto op = "conv2d_packed";
  check_device(op, x, packed);
  SADMM_CHECK(x.dim() == 4, op, ": x got ", x.dim(), " dimensions, wanted [batch, channels, height, width]");
  SADMM_CHECK(kernel_h >= 1 && kernel_w >= 1 && out_channels >= 1, op, ": sizes got ", out_channels, ", ", kernel_h,
              ", ", kernel_w, ", wanted at least 1");
  const Conv2dShape s = conv2d_shape(
      op, view_of(op, "x", x), Device::kCuda, x.size(1), kernel_h, kernel_w,
      {.stride = {stride_h, stride_w}, .padding = {padding_h, padding_w}, .dilation = {dilation_h, dilation_w}});
  Tensor y = torch::stable::new_empty(x, {s.batch, out_channels, s.out_h, s.out_w});
  conv2d_compact_cuda(op, s, static_cast<const float*>(x.data_ptr()),
                      {packed.data_ptr(), packed.numel(), out_channels, s.channels, kernel_h, kernel_w},
                      static_cast<float*>(y.data_ptr()), current_cuda_stream(op, x.get_device_index()));
  return y;
}

Tensor linear_packed_cuda(Tensor any, Tensor packed, int64_t out_features) {
  constexpr auto op = "linear_packed";
  check_device(op, any, packed);
  SADMM_CHECK(out_features >= 1, op, ": out_features got ", out_features, ", wanted at least 1");
  SADMM_CHECK(any.dim() >= 1, op, ": x got a scalar, wanted [..., features]");
  const Tensor x = with_rows(any);
  const TensorView view = view_of(op, "x", x);
  const int64_t features = view.sizes[view.dims - 1];
  const LinearShape s = linear_shape(op, view, Device::kCuda, features);
  std::vector<int64_t> sizes(view.sizes, view.sizes + view.dims);
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  linear_compact_cuda(op, s, static_cast<const float*>(x.data_ptr()),
                      {packed.data_ptr(), packed.numel(), out_features, features, 1, 1},
                      static_cast<float*>(y.data_ptr()), current_cuda_stream(op, x.get_device_index()));
  return y;
}

Tensor conv2d_compact_on_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                              Tensor block_taps, int64_t out_channels, std::vector<int64_t> kernel_size,
                              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups) {
  constexpr auto op = "conv2d_compact";
  SADMM_CHECK(x.dim() == 4, op, ": x got ", x.dim(), " dimensions, wanted [batch, channels, height, width]");
  check_pair(op, "kernel_size", kernel_size);
  check_pair(op, "stride", stride);
  check_pair(op, "padding", padding);
  check_pair(op, "dilation", dilation);
  const auto bytes = pack(op, table(op, to_cpu(weight), to_cpu(bias), to_cpu(taps), to_cpu(block_filters),
                                    to_cpu(block_taps), x.size(1), kernel_size[0], kernel_size[1], groups));
  check_filters(op, "out_channels", out_channels, unpack(op, bytes));
  return conv2d_packed_cuda(x, torch::stable::to(to_tensor(to_cpu(taps), bytes), x.device()), out_channels,
                            kernel_size[0], kernel_size[1], stride[0], stride[1], padding[0], padding[1], dilation[0],
                            dilation[1]);
}

Tensor linear_compact_on_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor taps, Tensor block_filters,
                              Tensor block_taps, int64_t out_features) {
  constexpr auto op = "linear_compact";
  SADMM_CHECK(x.dim() >= 1, op, ": x got a scalar, wanted [..., features]");
  const auto bytes = pack(op, table(op, to_cpu(weight), to_cpu(bias), to_cpu(taps), to_cpu(block_filters),
                                    to_cpu(block_taps), x.size(x.dim() - 1), 1, 1, 1));
  check_filters(op, "out_features", out_features, unpack(op, bytes));
  return linear_packed_cuda(x, torch::stable::to(to_tensor(to_cpu(taps), bytes), x.device()), out_features);
}

}  // namespace

// conv2d_packed takes its sizes one by one: a list costs half a microsecond on the way through the stable ABI.
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
      "-> Tensor");
  m.def(
      "conv2d_packed(Tensor x, Tensor packed, int out_channels, int kernel_h, int kernel_w, int stride_h, int "
      "stride_w, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w) -> Tensor");
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

STABLE_TORCH_LIBRARY_IMPL(structadmm, CUDA, m) {
  m.impl("conv2d_compact", TORCH_BOX(&conv2d_compact_on_cuda));
  m.impl("linear_compact", TORCH_BOX(&linear_compact_on_cuda));
  m.impl("conv2d_pack", TORCH_BOX(&conv2d_pack_cuda));
  m.impl("linear_pack", TORCH_BOX(&linear_pack_cuda));
  m.impl("conv2d_packed", TORCH_BOX(&conv2d_packed_cuda));
  m.impl("linear_packed", TORCH_BOX(&linear_packed_cuda));
}

}  // namespace structadmm::bindings
