#include "format/allowed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <sstream>

namespace structadmm::format {
namespace {

using Type = Field::Type;
using VK = Value::Kind;

// Sizes and counts stay below this, so that products of a few of them are far from overflow.
constexpr int64_t kLimit = int64_t{1} << 31;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

int64_t whole(const Config& c, const char* name) {
  return c.at(name).integer;
}
bool truth(const Config& c, const char* name) {
  return c.at(name).truth;
}

std::vector<Wanted> none(const Config&) {
  return {};
}

std::vector<Wanted> conv(const Config& c) {
  std::vector<int64_t> shape = {whole(c, "out_channels"), whole(c, "in_channels") / whole(c, "groups")};
  for (const Value& k : c.at("kernel_size").items) shape.push_back(k.integer);
  std::vector<Wanted> wanted = {{"weight", shape}};
  if (truth(c, "bias")) wanted.push_back({"bias", {whole(c, "out_channels")}});
  return wanted;
}

std::vector<Wanted> linear(const Config& c) {
  std::vector<Wanted> wanted = {{"weight", {whole(c, "out_features"), whole(c, "in_features")}}};
  if (truth(c, "bias")) wanted.push_back({"bias", {whole(c, "out_features")}});
  return wanted;
}

std::vector<Wanted> compact(const Config& c) {
  std::vector<Wanted> wanted = {{"weight", {-1}}};
  for (const char* name : {"taps", "block_filters", "block_taps"}) wanted.push_back({name, {-1}, true, Element::kI32});
  if (truth(c, "bias")) wanted.push_back({"bias", {whole(c, c.contains("groups") ? "out_channels" : "out_features")}});
  return wanted;
}

std::vector<Wanted> batch_norm(const Config& c) {
  const std::vector<int64_t> n = {whole(c, "num_features")};
  std::vector<Wanted> wanted;
  if (truth(c, "affine")) wanted = {{"weight", n}, {"bias", n}};
  if (truth(c, "track_running_stats")) {
    wanted.push_back({"running_mean", n});
    wanted.push_back({"running_var", n});
    wanted.push_back({"num_batches_tracked", {}, true, Element::kI64});
  }
  return wanted;
}

std::vector<Wanted> group_norm(const Config& c) {
  const std::vector<int64_t> n = {whole(c, "num_channels")};
  return truth(c, "affine") ? std::vector<Wanted>{{"weight", n}, {"bias", n}} : std::vector<Wanted>{};
}

std::vector<Wanted> layer_norm(const Config& c) {
  if (!truth(c, "elementwise_affine")) return {};
  std::vector<int64_t> shape;
  for (const Value& v : c.at("normalized_shape").items) shape.push_back(v.integer);
  std::vector<Wanted> wanted = {{"weight", shape}};
  if (truth(c, "bias")) wanted.push_back({"bias", shape});
  return wanted;
}

std::vector<Wanted> prelu(const Config& c) {
  return {{"weight", {whole(c, "num_parameters")}}};
}

std::vector<Wanted> channel_bias(const Config& c) {
  return {{"bias", {whole(c, "channels")}}};
}

std::vector<Field> conv_fields(int n) {
  return {{"in_channels", Type::kCount}, {"out_channels", Type::kCount}, {"kernel_size", Type::kSizes, n},
          {"stride", Type::kSizes, n},   {"padding", Type::kPadding, n}, {"dilation", Type::kSizes, n},
          {"groups", Type::kCount},      {"bias", Type::kBool},          {"padding_mode", Type::kPaddingMode}};
}

const std::vector<Field> kLinearFields = {
    {"in_features", Type::kCount}, {"out_features", Type::kCount}, {"bias", Type::kBool}};
const std::vector<Field> kBatchNormFields = {{"num_features", Type::kCount},
                                             {"eps", Type::kFloat},
                                             {"momentum", Type::kFloatOrNull},
                                             {"affine", Type::kBool},
                                             {"track_running_stats", Type::kBool}};
const std::vector<Field> kInplace = {{"inplace", Type::kBool}};
const std::vector<Field> kDropoutFields = {{"p", Type::kProbability}, {"inplace", Type::kBool}};

std::vector<Field> pool_fields(int n, bool average) {
  std::vector<Field> fields = {
      {"kernel_size", Type::kSizes, n}, {"stride", Type::kSizes, n}, {"padding", Type::kNaturals, n}};
  if (!average) fields.push_back({"dilation", Type::kSizes, n});
  fields.push_back({"ceil_mode", Type::kBool});
  if (average) fields.push_back({"count_include_pad", Type::kBool});
  if (average && n > 1) fields.push_back({"divisor_override", Type::kCountOrNull});
  return fields;
}

std::vector<LayerKind> make_kinds() {
  const auto adaptive = [](int n) { return std::vector<Field>{{"output_size", Type::kAdaptive, n}}; };
  const std::vector<Field> compact_conv = {{"in_channels", Type::kCount},    {"out_channels", Type::kCount},
                                           {"kernel_size", Type::kSizes, 2}, {"stride", Type::kSizes, 2},
                                           {"padding", Type::kNaturals, 2},  {"dilation", Type::kSizes, 2},
                                           {"groups", Type::kCount},         {"bias", Type::kBool}};
  return {
      {"Conv1d", conv_fields(1), conv},
      {"Conv2d", conv_fields(2), conv},
      {"Conv3d", conv_fields(3), conv},
      {"Linear", kLinearFields, linear},
      {"BatchNorm1d", kBatchNormFields, batch_norm},
      {"BatchNorm2d", kBatchNormFields, batch_norm},
      {"BatchNorm3d", kBatchNormFields, batch_norm},
      {"GroupNorm",
       {{"num_groups", Type::kCount}, {"num_channels", Type::kCount}, {"eps", Type::kFloat}, {"affine", Type::kBool}},
       group_norm},
      {"LayerNorm",
       {{"normalized_shape", Type::kShape},
        {"eps", Type::kFloat},
        {"elementwise_affine", Type::kBool},
        {"bias", Type::kBool}},
       layer_norm},
      {"PReLU", {{"num_parameters", Type::kCount}}, prelu},
      {"ReLU", kInplace, none},
      {"ReLU6", kInplace, none},
      {"LeakyReLU", {{"negative_slope", Type::kFloat}, {"inplace", Type::kBool}}, none},
      {"ELU", {{"alpha", Type::kFloat}, {"inplace", Type::kBool}}, none},
      {"GELU", {{"approximate", Type::kApproximate}}, none},
      {"SiLU", kInplace, none},
      {"Mish", kInplace, none},
      {"Hardswish", kInplace, none},
      {"Hardsigmoid", kInplace, none},
      {"Hardtanh", {{"min_val", Type::kFloat}, {"max_val", Type::kFloat}, {"inplace", Type::kBool}}, none},
      {"Softplus", {{"beta", Type::kFloat}, {"threshold", Type::kFloat}}, none},
      {"Sigmoid", {}, none},
      {"Tanh", {}, none},
      {"Softmax", {{"dim", Type::kDim}}, none},
      {"LogSoftmax", {{"dim", Type::kDim}}, none},
      {"MaxPool1d", pool_fields(1, false), none},
      {"MaxPool2d", pool_fields(2, false), none},
      {"MaxPool3d", pool_fields(3, false), none},
      {"AvgPool1d", pool_fields(1, true), none},
      {"AvgPool2d", pool_fields(2, true), none},
      {"AvgPool3d", pool_fields(3, true), none},
      {"AdaptiveAvgPool1d", adaptive(1), none},
      {"AdaptiveAvgPool2d", adaptive(2), none},
      {"AdaptiveAvgPool3d", adaptive(3), none},
      {"AdaptiveMaxPool1d", adaptive(1), none},
      {"AdaptiveMaxPool2d", adaptive(2), none},
      {"ZeroPad2d", {{"padding", Type::kNaturals, 4}}, none},
      {"PixelShuffle", {{"upscale_factor", Type::kCount}}, none},
      {"PixelUnshuffle", {{"downscale_factor", Type::kCount}}, none},
      {"ChannelShuffle", {{"groups", Type::kCount}}, none},
      {"Flatten", {{"start_dim", Type::kDim}, {"end_dim", Type::kDim}}, none},
      {"Dropout", kDropoutFields, none},
      {"Dropout1d", kDropoutFields, none},
      {"Dropout2d", kDropoutFields, none},
      {"Identity", {}, none},
      {"CompactConv2d", compact_conv, compact},
      {"CompactLinear", kLinearFields, compact},
      {"ChannelBias", {{"channels", Type::kCount}, {"dim", Type::kNatural}}, channel_bias},
  };
}

constexpr std::string_view kFunctions[] = {
    "operator.add",
    "operator.sub",
    "operator.mul",
    "operator.truediv",
    "operator.floordiv",
    "operator.mod",
    "operator.neg",
    "operator.iadd",
    "operator.isub",
    "operator.imul",
    "operator.getitem",
    "torch.add",
    "torch.sub",
    "torch.mul",
    "torch.div",
    "torch.neg",
    "torch.maximum",
    "torch.minimum",
    "torch.clamp",
    "torch.abs",
    "torch.exp",
    "torch.sqrt",
    "torch.rsqrt",
    "torch.square",
    "torch.pow",
    "torch.matmul",
    "torch.relu",
    "torch.relu_",
    "torch.sigmoid",
    "torch.tanh",
    "torch.softmax",
    "torch.log_softmax",
    "torch.dropout",
    "torch.cat",
    "torch.concat",
    "torch.stack",
    "torch.chunk",
    "torch.split",
    "torch.flatten",
    "torch.reshape",
    "torch.permute",
    "torch.transpose",
    "torch.squeeze",
    "torch.unsqueeze",
    "torch.mean",
    "torch.sum",
    "torch.amax",
    "torch.argmax",
    "F.relu",
    "F.relu_",
    "F.relu6",
    "F.leaky_relu",
    "F.elu",
    "F.gelu",
    "F.silu",
    "F.mish",
    "F.hardswish",
    "F.hardsigmoid",
    "F.hardtanh",
    "F.softplus",
    "F.prelu",
    "F.sigmoid",
    "F.tanh",
    "F.softmax",
    "F.log_softmax",
    "F.dropout",
    "F.dropout2d",
    "F.pad",
    "F.conv1d",
    "F.conv2d",
    "F.linear",
    "F.layer_norm",
    "F.max_pool1d",
    "F.max_pool2d",
    "F.avg_pool1d",
    "F.avg_pool2d",
    "F.pixel_shuffle",
    "F.adaptive_avg_pool1d",
    "F.adaptive_avg_pool2d",
    "F.adaptive_max_pool1d",
    "F.adaptive_max_pool2d",
    "getattr",
};

constexpr std::string_view kMethods[] = {
    "add",   "add_",    "sub",         "sub_",    "mul",    "mul_",    "div",     "div_",      "neg",     "clamp",
    "abs",   "exp",     "sqrt",        "rsqrt",   "square", "pow",     "matmul",  "relu",      "relu_",   "sigmoid",
    "tanh",  "softmax", "log_softmax", "flatten", "view",   "reshape", "permute", "transpose", "squeeze", "unsqueeze",
    "chunk", "split",   "contiguous",  "mean",    "sum",    "amax",    "argmax",  "size",      "dim",
};

bool is_int(const Value& v, int64_t low) {
  return v.is(VK::kInt) && v.integer >= low && v.integer < kLimit;
}

bool is_finite(const Value& v) {
  return v.is_number() && std::isfinite(v.number);
}

bool are_ints(const Value& v, size_t n, int64_t low) {
  return v.is(VK::kList) && v.items.size() == n &&
         std::ranges::all_of(v.items, [=](const Value& i) { return is_int(i, low); });
}

bool is_one_of(const Value& v, std::initializer_list<std::string_view> choices) {
  return v.is(VK::kString) && std::ranges::find(choices, v.text) != choices.end();
}

bool fits(const Field& f, const Value& v) {
  const size_t n = static_cast<size_t>(f.n);
  switch (f.type) {
    case Type::kCount:
      return is_int(v, 1);
    case Type::kNatural:
      return is_int(v, 0);
    case Type::kDim:
      return is_int(v, 1 - kLimit);
    case Type::kBool:
      return v.is(VK::kBool);
    case Type::kFloat:
      return is_finite(v);
    case Type::kProbability:
      return is_finite(v) && v.number >= 0 && v.number <= 1;
    case Type::kCountOrNull:
      return v.is_null() || is_int(v, 1);
    case Type::kFloatOrNull:
      return v.is_null() || is_finite(v);
    case Type::kSizes:
      return are_ints(v, n, 1);
    case Type::kNaturals:
      return are_ints(v, n, 0);
    case Type::kPadding:
      return are_ints(v, n, 0) || is_one_of(v, {"same", "valid"});
    case Type::kPaddingMode:
      return is_one_of(v, {"zeros", "reflect", "replicate", "circular"});
    case Type::kApproximate:
      return is_one_of(v, {"none", "tanh"});
    case Type::kAdaptive:
      return v.is(VK::kList) && v.items.size() == n &&
             std::ranges::all_of(v.items, [](const Value& i) { return i.is_null() || is_int(i, 1); });
    case Type::kShape:
      return v.is(VK::kList) && !v.items.empty() && v.items.size() < 9 && are_ints(v, v.items.size(), 1);
  }
  return false;
}

std::string wanted_of(const Field& f) {
  switch (f.type) {
    case Type::kCount:
      return "an integer of at least 1";
    case Type::kNatural:
      return "an integer of at least 0";
    case Type::kDim:
      return "an integer";
    case Type::kBool:
      return "true or false";
    case Type::kFloat:
      return "a finite number";
    case Type::kProbability:
      return "a number in [0, 1]";
    case Type::kCountOrNull:
      return "null or an integer of at least 1";
    case Type::kFloatOrNull:
      return "null or a finite number";
    case Type::kSizes:
      return text(f.n, " integers of at least 1");
    case Type::kNaturals:
      return text(f.n, " integers of at least 0");
    case Type::kPadding:
      return text(f.n, " integers of at least 0, or one of same, valid");
    case Type::kPaddingMode:
      return "one of zeros, reflect, replicate, circular";
    case Type::kApproximate:
      return "one of none, tanh";
    case Type::kAdaptive:
      return text(f.n, " sizes or nulls");
    case Type::kShape:
      return "a list of sizes";
  }
  return "";
}

std::string shown(const Value& v) {
  switch (v.kind) {
    case VK::kNull:
      return "null";
    case VK::kBool:
      return v.truth ? "true" : "false";
    case VK::kInt:
      return std::to_string(v.integer);
    case VK::kFloat:
      return text(v.number);
    case VK::kString:
      return text("'", cut(v.text), "'");
    default: {
      if (!v.is(VK::kList) || v.items.size() > 8) return "another value";
      std::string out = "[";
      for (const Value& i : v.items) out += (out.size() > 1 ? ", " : "") + (i.items.empty() ? shown(i) : "[...]");
      return out + "]";
    }
  }
}

std::string shown(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (const int64_t s : shape) out += (out.size() > 1 ? ", " : "") + (s < 0 ? "any" : std::to_string(s));
  return out + "]";
}

// The tables of a compacted layer: see FORMAT.md, "Compacted weights".
std::string wrong_tables(const Layer& layer) {
  const Config& c = layer.config;
  const bool is_conv = c.contains("groups");
  const int64_t groups = is_conv ? whole(c, "groups") : 1;
  const int64_t filters = whole(c, is_conv ? "out_channels" : "out_features"), per_group = filters / groups;
  int64_t columns = is_conv ? whole(c, "in_channels") / groups : whole(c, "in_features");
  if (is_conv) {
    for (const Value& k : c.at("kernel_size").items) {
      columns = columns > kLimit ? columns : columns * k.integer;  // below 2^62
    }
  }
  const auto taps = as_int32(layer.tensors.at("taps")), sizes = as_int32(layer.tensors.at("block_filters")),
             offsets = as_int32(layer.tensors.at("block_taps"));
  if (sizes.empty()) return "block_filters got no block, wanted at least one";
  if (offsets.size() != sizes.size() + 1) {
    return text("block_taps got ", offsets.size(), " offsets, wanted ", sizes.size() + 1);
  }
  const auto n_taps = static_cast<int64_t>(taps.size());
  if (offsets[0] != 0) return text("block_taps[0] got ", offsets[0], ", wanted 0");
  int64_t filter = 0, weights = 0;
  for (size_t b = 0; b < sizes.size(); ++b) {
    if (sizes[b] < 1 || sizes[b] > filters - filter) {
      return text("block_filters[", b, "] got ", sizes[b], ", wanted positive sizes that add up to ", filters);
    }
    if (filter / per_group != (filter + sizes[b] - 1) / per_group) {
      return text("block_filters[", b, "] got a block across conv groups, wanted blocks of the ", per_group, " in one");
    }
    const int64_t begin = offsets[b], end = offsets[b + 1];
    if (end < begin || end > n_taps) {
      return text("block_taps[", b + 1, "] got ", end, ", wanted offsets from 0 up to ", n_taps);
    }
    for (int64_t i = begin, before = -1; i < end; ++i) {
      if (taps[i] < 0 || taps[i] >= columns) return text("taps[", i, "] got ", taps[i], ", wanted 0 to ", columns - 1);
      if (taps[i] <= before) return text("taps[", i, "] got ", taps[i], ", wanted taps that ascend within a block");
      before = taps[i];
    }
    filter += sizes[b];
    weights += sizes[b] * (end - begin);
  }
  if (filter != filters) return text("block_filters got ", filter, " filters, wanted sizes that add up to ", filters);
  if (offsets.back() != n_taps) return text("block_taps got ", offsets.back(), " at its end, wanted ", n_taps);
  const int64_t got = layer.tensors.at("weight").numel();
  return got == weights ? "" : text("weight got [", got, "], wanted [", weights, "] as its tables say");
}

}  // namespace

std::string cut(std::string_view text) {
  std::string out(text.substr(0, 60));
  for (char& c : out) c = c >= ' ' && c <= '~' ? c : '?';
  return text.size() > 60 ? out + "..." : out;
}

std::span<const LayerKind> layer_kinds() {
  static const std::vector<LayerKind> kinds = make_kinds();
  return kinds;
}

const LayerKind* layer_kind(std::string_view name) {
  for (const LayerKind& kind : layer_kinds()) {
    if (kind.name == name) return &kind;
  }
  return nullptr;
}

std::span<const std::string_view> functions() {
  return kFunctions;
}
std::span<const std::string_view> methods() {
  return kMethods;
}
bool allowed_function(std::string_view name) {
  return std::ranges::find(kFunctions, name) != std::end(kFunctions);
}
bool allowed_method(std::string_view name) {
  return std::ranges::find(kMethods, name) != std::end(kMethods);
}

std::string wrong_config(const LayerKind& kind, const Config& config) {
  bool same = config.size() == kind.fields.size();
  std::string names;
  for (const Field& f : kind.fields) {
    same = same && config.contains(std::string(f.name));
    names += (names.empty() ? "" : ", ") + std::string(f.name);
  }
  if (!same) {
    std::string got;
    for (const auto& [name, value] : config) got += (got.empty() ? "" : ", ") + cut(name);
    return text("config got ", got, ", wanted the fields ", names.empty() ? "(none)" : names);
  }
  for (const Field& f : kind.fields) {
    const Value& v = config.at(std::string(f.name));
    if (!fits(f, v)) return text(f.name, " got ", shown(v), ", wanted ", wanted_of(f));
  }
  if (config.contains("in_channels")) {
    const int64_t groups = whole(config, "groups"), in = whole(config, "in_channels"),
                  out = whole(config, "out_channels");
    if (in % groups || out % groups) {
      return text("groups got ", groups, ", wanted a divisor of ", in, " and ", out, " channels");
    }
  }
  if (kind.name == "GroupNorm" && whole(config, "num_channels") % whole(config, "num_groups")) {
    return text("num_groups got ", whole(config, "num_groups"), ", wanted a divisor of ", whole(config, "num_channels"),
                " channels");
  }
  return "";
}

std::string wrong_tensors(const LayerKind& kind, const Layer& layer) {
  for (const Wanted& w : kind.tensors(layer.config)) {
    const Stored& t = layer.tensors.at(w.name);
    bool fits = t.shape.size() == w.shape.size();
    for (size_t d = 0; fits && d < w.shape.size(); ++d) fits = w.shape[d] < 0 || w.shape[d] == t.shape[d];
    if (!fits) return text(w.name, " got ", shown(t.shape), ", wanted ", shown(w.shape));
    const bool floating = t.element <= Element::kBf16;
    if (w.integer ? t.element != w.element : !floating) {
      return text(w.name, " got ", element_name(t.element), ", wanted ",
                  w.integer ? element_name(w.element) : "a floating dtype");
    }
  }
  return layer.tensors.contains("taps") ? wrong_tables(layer) : "";
}

}  // namespace structadmm::format
