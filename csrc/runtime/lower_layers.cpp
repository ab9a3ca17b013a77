// Convolutions, linear layers, BatchNorm, activations and pooling.
#include "runtime/lowering.h"

#include <array>
#include <cmath>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace structadmm::runtime::lowering {
namespace {

// A dense weight [filters, columns] as one block per conv group: columns without a weight are left out.
template <class Spec>
void compact_dense(Spec& spec, const Stored& weight, int64_t filters, int64_t groups) {
  const std::vector<float> dense = format::as_floats(weight);
  const int64_t per_group = filters / groups, columns = static_cast<int64_t>(dense.size()) / filters;
  spec.block_taps.push_back(0);
  for (int64_t g = 0; g < groups; ++g) {
    const float* rows = dense.data() + g * per_group * columns;
    const size_t first = spec.taps.size();
    for (int64_t j = 0; j < columns; ++j) {
      bool any = false;
      for (int64_t f = 0; f < per_group && !any; ++f) any = rows[f * columns + j] != 0;  // NaN is a weight too
      if (any) spec.taps.push_back(static_cast<int32_t>(j));
    }
    for (int64_t f = 0; f < per_group; ++f) {
      for (size_t t = first; t < spec.taps.size(); ++t) spec.weight.push_back(rows[f * columns + spec.taps[t]]);
    }
    spec.block_filters.push_back(static_cast<int32_t>(per_group));
    spec.block_taps.push_back(static_cast<int32_t>(spec.taps.size()));
  }
}

template <class Spec>
void take_tables(Spec& spec, const Layer& layer) {
  spec.weight = format::as_floats(layer.tensors.at("weight"));
  spec.taps = format::as_int32(layer.tensors.at("taps"));
  spec.block_filters = format::as_int32(layer.tensors.at("block_filters"));
  spec.block_taps = format::as_int32(layer.tensors.at("block_taps"));
}

}  // namespace

Item Lowering::conv_layer(const Value& x, const Layer& layer, const Stored* bias) {
  const Config& c = layer.config;
  const bool dense = layer.kind == "Conv2d";
  if (dense) {
    const std::string& mode = c.at("padding_mode").text;
    SADMM_CHECK(mode == "zeros", "padding_mode got ", mode, ", wanted zeros");
  }
  ConvSpec spec;
  spec.in_channels = c.at("in_channels").integer;
  spec.out_channels = c.at("out_channels").integer;
  const auto kernel = pair_of("kernel_size", c.at("kernel_size"), 1);
  geometry(spec, {kernel[0], kernel[1]}, c.at("stride"), c.at("padding"), c.at("dilation"), c.at("groups").integer);
  const Item in = conv_input(x, spec);
  if (dense && !collect_) compact_dense(spec, layer.tensors.at("weight"), spec.out_channels, spec.groups);
  if (!dense && !collect_) take_tables(spec, layer);
  return conv(in, std::move(spec), bias);
}

Item Lowering::linear_layer(const Value& x, const Layer& layer, const Stored* bias) {
  const bool dense = layer.kind == "Linear";
  LinearSpec spec;
  spec.in_features = layer.config.at("in_features").integer;
  spec.out_features = layer.config.at("out_features").integer;
  const Item in = features(x);
  if (dense && !collect_) compact_dense(spec, layer.tensors.at("weight"), spec.out_features, 1);
  if (!dense && !collect_) take_tables(spec, layer);
  return linear(in, std::move(spec), bias);
}

void Lowering::geometry(ConvSpec& spec, std::array<int64_t, 2> kernel, const Value& stride, const Value& padding,
                        const Value& dilation, int64_t groups) {
  const auto s = pair_of("stride", stride, 1), d = pair_of("dilation", dilation, 1);
  spec.groups = groups;
  for (size_t i = 0; i < 2; ++i) {
    spec.kernel[i] = kernel[i];
    spec.stride[i] = s[i];
    spec.dilation[i] = d[i];
    SADMM_CHECK(d[i] < kFar && kernel[i] < kFar && d[i] * (kernel[i] - 1) < kFar, "dilation got ", d[i],
                ", wanted a kernel that reaches less than ", kFar);
    if (padding.is(VK::kString)) {
      const int64_t total = padding.text == "same" ? d[i] * (kernel[i] - 1) : 0;
      SADMM_CHECK(padding.text == "same" || padding.text == "valid", "padding got ", shown(padding),
                  ", wanted a number");
      SADMM_CHECK(padding.text == "valid" || s[i] == 1, "stride got ", s[i], ", wanted 1 with padding 'same'");
      SADMM_CHECK(total % 2 == 0, "padding got 'same' for a kernel that reaches ", total,
                  " further, wanted the same on both sides");
      spec.padding[i] = total / 2;
    } else {
      spec.padding[i] = pair_of("padding", padding, 0)[i];
    }
  }
}

Item Lowering::conv_input(const Value& v, ConvSpec& spec) {
  Item x = any_tensor(v);
  SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
  for (int i = 0; i < 2; ++i) {
    spec.padding[i] += x.pad[i];
    SADMM_CHECK(spec.padding[i] < kFar, "padding got ", spec.padding[i], ", wanted less than ", kFar);
    x.pad[i] = 0;
  }
  x = plain(x);
  SADMM_CHECK(x.channels < 0 || x.channels == spec.in_channels, "x got ", x.channels, " channels, wanted ",
              spec.in_channels);
  return x;
}

Item Lowering::conv(const Item& x, ConvSpec spec, const Stored* bias) {
  if (bias) spec.bias = format::as_floats(*bias);
  const auto out = [&](int axis, int64_t in) {
    const int64_t size = in < 0 ? -1 : spec.out_size(axis, in);
    SADMM_CHECK(in < 0 || size > 0, "x got ", in, " pixels, wanted at least as many as the kernel has");
    return size;
  };
  const int64_t channels = spec.out_channels, height = out(0, x.height), width = out(1, x.width);
  Node node = node_of(Kind::kConv, {x.value});
  node.conv = std::make_shared<ConvSpec>(std::move(spec));
  const auto family = file_.families.find(file_.graph[static_cast<size_t>(at_)].target);
  if (family != file_.families.end()) node.family = family->second;
  return tensor(add(std::move(node)), true, channels, height, width);
}

Item Lowering::linear(const Item& x, LinearSpec spec, const Stored* bias) {
  SADMM_CHECK(x.channels < 0 || x.channels == spec.in_features, "x got ", x.channels, " features, wanted ",
              spec.in_features);
  if (bias) spec.bias = format::as_floats(*bias);
  const int64_t features = spec.out_features;
  Node node = node_of(Kind::kLinear, {x.value});
  node.linear = std::make_shared<LinearSpec>(std::move(spec));
  return tensor(add(std::move(node)), false, features);
}

Item Lowering::functional(const Call& call, bool is_conv) {
  const Arguments a = is_conv ? Arguments(call, {"input", "weight", "bias", "stride", "padding", "dilation", "groups"})
                              : Arguments(call, {"input", "weight", "bias"});
  const Stored *weight = stored(&a.get("weight")), *bias = stored(a.find("bias"));
  SADMM_CHECK(weight && weight->shape.size() == (is_conv ? 4 : 2) && weight->numel() > 0,
              "weight got another shape, wanted ", is_conv ? "[O, C, H, W]" : "[O, N]");
  const int64_t filters = weight->shape[0];
  SADMM_CHECK(!bias || bias->shape == std::vector<int64_t>{filters}, "bias got another shape, wanted [", filters, "]");
  if (!is_conv) {
    LinearSpec spec;
    spec.in_features = weight->shape[1];
    spec.out_features = filters;
    const Item x = features(a.get("input"));
    if (!collect_) compact_dense(spec, *weight, filters, 1);
    return linear(x, std::move(spec), bias);
  }
  ConvSpec spec;
  const int64_t groups = a.whole("groups", 1);
  SADMM_CHECK(groups >= 1 && filters % groups == 0, "groups got ", groups, ", wanted a divisor of ", filters);
  spec.in_channels = weight->shape[1] * groups;
  spec.out_channels = filters;
  const Value one = number_value(1), zero = number_value(0);
  const auto get = [&](const char* name, const Value& other) -> const Value& {
    return a.find(name) ? *a.find(name) : other;
  };
  geometry(spec, {weight->shape[2], weight->shape[3]}, get("stride", one), get("padding", zero), get("dilation", one),
           groups);
  const Item x = conv_input(a.get("input"), spec);
  if (!collect_) compact_dense(spec, *weight, filters, groups);
  return conv(x, std::move(spec), bias);
}

Item Lowering::batch_norm(const Item& x, const Layer& layer) {
  const Config& c = layer.config;
  SADMM_CHECK(c.at("track_running_stats").truth, "track_running_stats got false, wanted statistics of training");
  const int64_t n = c.at("num_features").integer;
  const auto get = [&](const char* name, float other) {
    const auto it = layer.tensors.find(name);
    return it == layer.tensors.end() ? std::vector<float>(static_cast<size_t>(n), other)
                                     : format::as_floats(it->second);
  };
  const auto weight = get("weight", 1), bias = get("bias", 0), mean = get("running_mean", 0),
             var = get("running_var", 1);
  std::vector<double> scale, shift;
  for (size_t i = 0; i < weight.size(); ++i) {
    scale.push_back(weight[i] / std::sqrt(static_cast<double>(var[i]) + c.at("eps").number));
    shift.push_back(bias[i] - mean[i] * scale[i]);
  }
  return scale_shift(x, std::move(scale), std::move(shift));
}

Item Lowering::activation(const Value& v, const Epilogue& epilogue, bool in_place) {
  const Item x = operand(v);
  if (in_place) overwrite(v);
  Node node = node_of(Kind::kCopy, {x.value});
  node.epilogue = epilogue;
  return like(x, std::move(node));
}

Item Lowering::pool(const Item& x, bool max, const Value& kernel, const Value* stride, const Value* padding,
                    const Value* dilation, bool ceil_mode, bool count_include_pad, int64_t divisor) {
  Node node = node_of(Kind::kPool, {x.value});
  node.pool.max = max;
  node.pool.count_include_pad = count_include_pad;
  node.pool.divisor_override = divisor;
  node.ceil_mode = ceil_mode;
  SADMM_CHECK(divisor >= 0, "divisor_override got ", divisor, ", wanted a positive number");
  const auto k = pair_of("kernel_size", kernel, 1);
  const bool no_stride = !stride || stride->is_null() || (stride->is_sequence() && stride->items.empty());
  const auto s = no_stride ? k : pair_of("stride", *stride, 1);
  const auto p = padding ? pair_of("padding", *padding, 0) : std::array<int64_t, 2>{0, 0};
  const auto d = dilation ? pair_of("dilation", *dilation, 1) : std::array<int64_t, 2>{1, 1};
  for (size_t i = 0; i < 2; ++i) {
    SADMM_CHECK(p[i] <= k[i] / 2, "padding got ", p[i], ", wanted at most half of the window, ", k[i] / 2);
    SADMM_CHECK(d[i] < kFar && k[i] < kFar && d[i] * (k[i] - 1) < kFar, "kernel_size got ", k[i],
                ", wanted a window that reaches less than ", kFar);
    node.pool.kernel[i] = k[i];
    node.pool.stride[i] = s[i];
    node.pool.padding[i] = p[i];
    node.pool.dilation[i] = d[i];
  }
  return tensor(add(std::move(node)), true, x.channels);
}

Item Lowering::adaptive_pool(const Item& x, bool max, const Value& size) {
  const auto out = pair_of("output_size", size, 1);
  return adaptive_pool(x, max, out[0], out[1]);
}

Item Lowering::adaptive_pool(const Item& x, bool max, int64_t height, int64_t width) {
  Node node = node_of(Kind::kAdaptivePool, {x.value});
  node.pool.max = max;
  node.size[0] = height;
  node.size[1] = width;
  SADMM_CHECK(height < kFar && width < kFar, "output_size got ", height, ", ", width, ", wanted less than ", kFar);
  return tensor(add(std::move(node)), true, x.channels, height, width);
}

Item Lowering::mean(const Arguments& a) {
  a.without("dtype");
  const Item x = maps(a.get("input"));
  const Value& dim = a.get("dim");
  std::set<int64_t> dims;
  if (dim.is_sequence()) {
    for (const Value& d : dim.items) {
      if (d.is(VK::kInt)) dims.insert(d.integer < 0 ? d.integer + 4 : d.integer);
    }
  }
  SADMM_CHECK((dims == std::set<int64_t>{2, 3}), "dim got ", shown(dim), ", wanted (2, 3)");
  const Item y = adaptive_pool(x, false, 1, 1);
  return a.flag("keepdim", false) ? y : flat(y, 0);
}

}  // namespace structadmm::runtime::lowering
