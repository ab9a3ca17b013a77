// Which lowering a kind of layer and the name of a function or method ask for.
#include "runtime/lowering.h"

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/allowed.h"

namespace structadmm::runtime::lowering {
namespace {

std::optional<Epilogue> plain_activation(std::string_view name) {
  Epilogue e;
  if (name == "relu" || name == "ReLU" || name == "relu_") return Epilogue{.low = 0};
  if (name == "relu6" || name == "ReLU6") return Epilogue{.low = 0, .high = 6};
  if (name == "silu" || name == "SiLU") e.activation = Activation::kSilu;
  if (name == "hardswish" || name == "Hardswish") e.activation = Activation::kHardswish;
  if (name == "hardsigmoid" || name == "Hardsigmoid") e.activation = Activation::kHardsigmoid;
  if (name == "sigmoid" || name == "Sigmoid") e.activation = Activation::kSigmoid;
  if (name == "tanh" || name == "Tanh") e.activation = Activation::kTanh;
  return e.none() ? std::nullopt : std::optional(e);
}

Epilogue gelu(const std::string& approximate) {
  SADMM_CHECK(approximate == "none" || approximate == "tanh", "approximate got ", format::cut(approximate),
              ", wanted none or tanh");
  return {.activation = approximate == "tanh" ? Activation::kGeluTanh : Activation::kGelu};
}

Epilogue leaky(double slope) {
  return {.activation = Activation::kLeakyRelu, .slope = static_cast<float>(slope)};
}

Epilogue clamp(double low, double high) {
  SADMM_CHECK(low <= high, "min got ", low, ", wanted at most max, ", high);
  return {.low = static_cast<float>(low), .high = static_cast<float>(high)};
}

}  // namespace

Item Lowering::module(const Call& call, const Layer& layer) {
  SADMM_CHECK(call.args.size() + call.kwargs.size() == 1, "args got ", call.args.size() + call.kwargs.size(),
              ", wanted one tensor");
  const Value& x = call.args.empty() ? call.kwargs.begin()->second : call.args[0];
  const Config& c = layer.config;
  const std::string& kind = layer.kind;
  const auto bias = layer.tensors.find("bias");
  const Stored* b = bias == layer.tensors.end() ? nullptr : &bias->second;
  if (kind == "Conv2d" || kind == "CompactConv2d") return conv_layer(x, layer, b);
  if (kind == "Linear" || kind == "CompactLinear") return linear_layer(x, layer, b);
  if (kind == "BatchNorm2d" || kind == "BatchNorm1d")
    return batch_norm(kind == "BatchNorm2d" ? maps(x) : features(x), layer);
  if (kind == "ChannelBias") {
    SADMM_CHECK(c.at("dim").integer == 1, "dim got ", c.at("dim").integer, ", wanted 1");
    const std::vector<float> shift = format::as_floats(*b);
    return scale_shift(operand(x), std::vector<double>(shift.size(), 1.0), {shift.begin(), shift.end()});
  }
  if (kind == "Identity" || kind == "DropPath" || kind.starts_with("Dropout")) return any_tensor(x);
  if (kind == "Flatten") return flatten(x, c.at("start_dim").integer, c.at("end_dim").integer);
  if (kind == "ZeroPad2d") {
    std::vector<int64_t> widths;
    for (const Value& v : c.at("padding").items) widths.push_back(v.integer);
    return pad(x, widths);
  }
  if (kind == "ChannelShuffle") return shuffle(x, c.at("groups").integer);
  if (kind == "MaxPool2d") {
    return pool(maps(x), true, c.at("kernel_size"), &c.at("stride"), &c.at("padding"), &c.at("dilation"),
                c.at("ceil_mode").truth, true, 0);
  }
  if (kind == "AvgPool2d") {
    const Value& divisor = c.at("divisor_override");
    return pool(maps(x), false, c.at("kernel_size"), &c.at("stride"), &c.at("padding"), nullptr,
                c.at("ceil_mode").truth, c.at("count_include_pad").truth, divisor.is_null() ? 0 : divisor.integer);
  }
  if (kind == "AdaptiveAvgPool2d" || kind == "AdaptiveMaxPool2d") {
    return adaptive_pool(maps(x), kind == "AdaptiveMaxPool2d", c.at("output_size"));
  }
  std::optional<Epilogue> e = plain_activation(kind);
  if (kind == "LeakyReLU") e = leaky(c.at("negative_slope").number);
  if (kind == "GELU") e = gelu(c.at("approximate").text);
  if (kind == "Hardtanh") e = clamp(c.at("min_val").number, c.at("max_val").number);
  if (kind == "PReLU") {
    SADMM_CHECK(c.at("num_parameters").integer == 1, "num_parameters got ", c.at("num_parameters").integer,
                ", wanted 1");
    e = leaky(format::as_floats(layer.tensors.at("weight"))[0]);
  }
  SADMM_CHECK(e, "layer got ", kind, ", wanted one that the runtime has");
  return activation(x, *e, c.contains("inplace") && c.at("inplace").truth);
}

Item Lowering::function(const Call& call, const std::string& name) {
  if (call.target == "getattr") {
    SADMM_CHECK(call.args[1].text == "shape", "getattr got ", call.args[1].text, ", wanted shape");
    return shape(call.args[0]);
  }
  if (name == "getitem") return getitem(Arguments(call, {"a", "b"}));
  if (name == "size") return size(Arguments(call, {"self", "dim"}));
  if (name == "dim") {
    const Item x = any_tensor(call.args.at(0));
    return number(x.maps ? 4 : 2);
  }
  const bool in_place = name.ends_with("_") || call.target == "operator.iadd" || call.target == "operator.isub" ||
                        call.target == "operator.imul";
  std::string verb = name.ends_with("_") ? name.substr(0, name.size() - 1) : name;
  if (call.target.starts_with("operator.i")) verb = verb.substr(1);
  if (verb == "truediv") verb = "div";
  if (verb == "add" || verb == "sub" || verb == "mul" || verb == "div" || verb == "floordiv") {
    return arithmetic(call, verb, in_place);
  }
  if (verb == "neg") {
    const Arguments a(call, {"input"});
    const Item x = operand(a.get("input"));
    return scale_shift(x, constants(x, -1), constants(x, 0));
  }
  if (verb == "relu" || verb == "relu6" || verb == "silu" || verb == "hardswish" || verb == "hardsigmoid" ||
      verb == "sigmoid" || verb == "tanh") {
    const Arguments a(call, {"input", "inplace"});
    return activation(a.get("input"), *plain_activation(verb), in_place || a.flag("inplace", false));
  }
  if (verb == "gelu") {
    const Arguments a(call, {"input", "approximate"});
    const Value* how = a.find("approximate");
    return activation(a.get("input"), gelu(how ? how->text : "none"), false);
  }
  if (verb == "leaky_relu") {
    const Arguments a(call, {"input", "negative_slope", "inplace"});
    return activation(a.get("input"), leaky(a.number("negative_slope", 0.01)), a.flag("inplace", false));
  }
  if (verb == "hardtanh") {
    const Arguments a(call, {"input", "min_val", "max_val", "inplace"});
    return activation(a.get("input"), clamp(a.number("min_val", -1), a.number("max_val", 1)), a.flag("inplace", false));
  }
  if (verb == "clamp") {
    const Arguments a(call, {"input", "min", "max"});
    const double infinite = std::numeric_limits<double>::infinity();
    const auto bound = [&](const char* key, double other) {
      const Value* v = a.find(key);
      return !v || v->is_null() ? other : a.number(key, other);
    };
    return activation(a.get("input"), clamp(bound("min", -infinite), bound("max", infinite)), false);
  }
  if (verb == "dropout" || verb == "dropout2d") {
    const Arguments a(call, {"input", "p", "training", "inplace"});
    // torch.dropout has no default for `train`; F.dropout trains unless told otherwise.
    const Value* training = a.find("training");
    SADMM_CHECK(call.target.starts_with("F.") && training && training->is(VK::kBool) && !training->truth,
                "training got True, wanted False");
    return any_tensor(a.get("input"));
  }
  if (verb == "contiguous") return any_tensor(Arguments(call, {"self"}).get("self"));
  if (verb == "flatten") {
    const Arguments a(call, {"input", "start_dim", "end_dim"});
    return flatten(a.get("input"), a.whole("start_dim", 0), a.whole("end_dim", -1));
  }
  if (verb == "view" || verb == "reshape") return view(call);
  if (verb == "mean") return mean(Arguments(call, {"input", "dim", "keepdim", "dtype"}));
  if (verb == "cat" || verb == "concat") {
    const Arguments a(call, {"tensors", "dim"});
    return concat(a.get("tensors"), a.whole("dim", 0));
  }
  if (verb == "chunk") {
    const Arguments a(call, {"input", "chunks", "dim"});
    return chunk(a.get("input"), a.whole("chunks", 0), a.whole("dim", 0));
  }
  if (verb == "pad") {
    const Arguments a(call, {"input", "pad", "mode", "value"});
    const Value* mode = a.find("mode");
    SADMM_CHECK(!mode || mode->text == "constant", "mode got ", mode ? shown(*mode) : "", ", wanted constant");
    const Value* value = a.find("value");
    SADMM_CHECK(!value || value->is_null() || (value->is_number() && value->number == 0), "value got ",
                value ? shown(*value) : "", ", wanted 0");
    std::vector<int64_t> widths;
    SADMM_CHECK(a.get("pad").is_sequence(), "pad got ", shown(a.get("pad")), ", wanted a list");
    for (const Value& v : a.get("pad").items) {
      SADMM_CHECK(v.is(VK::kInt) && v.integer >= 0 && v.integer < kFar, "pad got ", shown(v), ", wanted 0 to ",
                  kFar - 1);
      widths.push_back(v.integer);
    }
    return pad(a.get("input"), widths);
  }
  if (verb == "max_pool2d") {
    const Arguments a(call, {"input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"});
    a.without("return_indices");
    return pool(maps(a.get("input")), true, a.get("kernel_size"), a.find("stride"), a.find("padding"),
                a.find("dilation"), a.flag("ceil_mode", false), true, 0);
  }
  if (verb == "avg_pool2d") {
    const Arguments a(
        call, {"input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"});
    const Value* divisor = a.find("divisor_override");
    return pool(maps(a.get("input")), false, a.get("kernel_size"), a.find("stride"), a.find("padding"), nullptr,
                a.flag("ceil_mode", false), a.flag("count_include_pad", true),
                !divisor || divisor->is_null() ? 0 : a.whole("divisor_override", 0));
  }
  if (verb == "adaptive_avg_pool2d" || verb == "adaptive_max_pool2d") {
    const Arguments a(call, {"input", "output_size", "return_indices"});
    a.without("return_indices");
    return adaptive_pool(maps(a.get("input")), verb == "adaptive_max_pool2d", a.get("output_size"));
  }
  if (verb == "conv2d" || verb == "linear") return functional(call, verb == "conv2d");
  fail("function got ", call.target, ", wanted one that the runtime has");
}

}  // namespace structadmm::runtime::lowering
