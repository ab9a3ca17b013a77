// The lists themselves.
#include "format/allowed.h"

#include <algorithm>
#include <string>

namespace structadmm::format {
namespace {

using Type = Field::Type;
using VK = Value::Kind;

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

std::vector<Wanted> rms_norm(const Config& c) {
  if (!truth(c, "elementwise_affine")) return {};
  std::vector<int64_t> shape;
  for (const Value& v : c.at("normalized_shape").items) shape.push_back(v.integer);
  return {{"weight", shape}};
}

std::vector<Wanted> embedding(const Config& c) {
  return {{"weight", {whole(c, "num_embeddings"), whole(c, "embedding_dim")}}};
}

std::vector<Wanted> prelu(const Config& c) {
  return {{"weight", {whole(c, "num_parameters")}}};
}

std::vector<Wanted> channel_bias(const Config& c) {
  return {{"bias", {whole(c, "channels")}}};
}

template <int kGates>
std::vector<Wanted> recurrent(const Config& c) {
  const int64_t h = whole(c, "hidden_size"), rows = kGates * h, directions = truth(c, "bidirectional") ? 2 : 1;
  std::vector<Wanted> wanted;
  for (int64_t layer = 0; layer < whole(c, "num_layers"); ++layer) {
    for (int64_t d = 0; d < directions; ++d) {
      const std::string suffix = "_l" + std::to_string(layer) + (d ? "_reverse" : "");
      wanted.push_back({"weight_ih" + suffix, {rows, layer ? h * directions : whole(c, "input_size")}});
      wanted.push_back({"weight_hh" + suffix, {rows, h}});
      if (!truth(c, "bias")) continue;
      wanted.push_back({"bias_ih" + suffix, {rows}});
      wanted.push_back({"bias_hh" + suffix, {rows}});
    }
  }
  return wanted;
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
const std::vector<Field> kRecurrentFields = {
    {"input_size", Type::kCount}, {"hidden_size", Type::kCount},   {"num_layers", Type::kCount},  {"bias", Type::kBool},
    {"batch_first", Type::kBool}, {"dropout", Type::kProbability}, {"bidirectional", Type::kBool}};
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
      {"RMSNorm",
       {{"normalized_shape", Type::kShape}, {"eps", Type::kFloatOrNull}, {"elementwise_affine", Type::kBool}},
       rms_norm},
      {"Embedding", {{"num_embeddings", Type::kCount}, {"embedding_dim", Type::kCount}}, embedding},
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
      {"DropPath", {{"p", Type::kProbability}, {"per_sample", Type::kBool}, {"rescale", Type::kBool}}, none},
      {"Identity", {}, none},
      {"CompactConv2d", compact_conv, compact},
      {"CompactLinear", kLinearFields, compact},
      {"ChannelBias", {{"channels", Type::kCount}, {"dim", Type::kNatural}}, channel_bias},
      {"LSTM", kRecurrentFields, recurrent<4>},
      {"GRU", kRecurrentFields, recurrent<3>},
  };
}

struct Names {
  std::string_view prefix, words;
};

// In the order of python/structadmm/allowed.py.
constexpr Names kFunctions[] = {
    {"operator.", "add sub mul truediv floordiv mod neg iadd isub imul getitem matmul pow invert ne eq"},
    {"torch.", "add sub mul div neg maximum minimum clamp abs exp sqrt rsqrt square pow matmul"},
    {"torch.", "relu relu_ sigmoid tanh softmax log_softmax dropout"},
    {"torch.", "cat concat stack chunk split flatten reshape permute transpose squeeze unsqueeze"},
    {"torch.", "mean sum amax argmax bmm roll unbind unflatten swapaxes movedim flip tile erf log where"},
    {"torch.", "einsum addcmul zeros ones arange cumsum sin cos masked_fill repeat_interleave tensor_split"},
    {"F.", "relu relu_ relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh softplus prelu"},
    {"F.", "sigmoid tanh softmax log_softmax dropout dropout2d pad conv1d conv2d linear layer_norm"},
    {"F.", "max_pool1d max_pool2d avg_pool1d avg_pool2d pixel_shuffle pixel_unshuffle channel_shuffle"},
    {"F.", "scaled_dot_product_attention interpolate group_norm rms_norm normalize selu celu logsigmoid"},
    {"F.", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d"},
    {"F.", "unfold fold dropout1d dropout3d max_pool3d avg_pool3d adaptive_avg_pool3d conv3d"},
    {"", "getattr"},
    {"math.", "ceil"},
    {"structadmm.", "assigned"},
};

constexpr Names kMethods[] = {
    {"", "add add_ sub sub_ mul mul_ div div_ neg clamp abs exp sqrt rsqrt square pow matmul relu relu_ sigmoid tanh"},
    {"",
     "softmax log_softmax flatten view reshape permute transpose squeeze unsqueeze chunk split contiguous mean sum"},
    {"",
     "amax argmax size dim bmm roll unbind unflatten swapaxes movedim flip expand expand_as reshape_as repeat amin"},
    {"", "erf log type_as select narrow norm to float sin cos cumsum repeat_interleave unfold masked_fill clone zero_"},
    {"", "addcmul max new_zeros new_ones new_full detach"},
};

NameSet expanded(std::span<const Names> lines) {
  NameSet out;
  for (const Names& line : lines) {
    for (size_t begin = 0, end; begin < line.words.size(); begin = end + 1) {
      end = std::min(line.words.find(' ', begin), line.words.size());
      out.insert(std::string(line.prefix) + std::string(line.words.substr(begin, end - begin)));
    }
  }
  return out;
}

}  // namespace

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

const NameSet& functions() {
  static const auto names = expanded(kFunctions);
  return names;
}
const NameSet& methods() {
  static const auto names = expanded(kMethods);
  return names;
}
bool allowed_function(std::string_view name) {
  return functions().contains(name);
}
bool allowed_method(std::string_view name) {
  return methods().contains(name);
}

}  // namespace structadmm::format
