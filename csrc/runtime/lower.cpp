#include "runtime/lower.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <set>

#include "base/check.h"
#include "format/allowed.h"
#include "runtime/fuse.h"

namespace structadmm::runtime {
namespace {

using format::Artefact;
using format::Call;
using format::Config;
using format::Layer;
using format::Op;
using format::Stored;
using format::Value;
using VK = Value::Kind;

// Padding and reach of a kernel: more is no network, and would be halos of gigabytes.
constexpr int64_t kFar = 1 << 14;
// Channels of a value that the lowering handles one by one.
constexpr int64_t kMany = 1 << 20;

// A product of sizes that are known when data arrive, and a number. Factors are (value, dimension); (-1, 0) is the
// batch.
struct Size {
  int64_t number = 1;
  std::multiset<std::pair<int, int>> factors;
  bool opaque = false;  // another expression

  bool is_batch() const { return !opaque && number == 1 && factors == std::multiset<std::pair<int, int>>{{-1, 0}}; }
  bool is_number() const { return !opaque && factors.empty(); }
};

// What a node of the artefact is to the nodes behind it.
struct Item {
  enum class Kind { kAbsent, kTensor, kConstant, kSize, kList, kShape };
  Kind kind = Kind::kAbsent;

  // kTensor: a value of the runtime graph, or channels picked from one at every stride-th pixel (-1: zeros).
  int value = -1;
  bool maps = false;                               // [N, C, H, W], else [N, C]
  int64_t channels = -1, height = -1, width = -1;  // -1: not known before data arrive
  bool picked = false;
  std::vector<int64_t> pick;
  int64_t stride[2] = {1, 1};
  int64_t pad[2] = {0, 0};  // zeros around that the next convolution adds to its own
  int storage = -1;         // the first node of those that share its memory
  bool overwritten = false;

  const Stored* constant = nullptr;
  Size size;
  std::vector<Item> list;
  int shape_of = -1;  // kShape: the node whose shape it is
};

std::string shown(const Value& v) {
  switch (v.kind) {
    case VK::kNull:
      return "None";
    case VK::kBool:
      return v.truth ? "True" : "False";
    case VK::kInt:
      return std::to_string(v.integer);
    case VK::kFloat:
      return std::to_string(v.number);
    case VK::kString:
      return format::cut(v.text);
    case VK::kNode:
      return "a tensor";
    default:
      return "another value";
  }
}

// Bound arguments of a function or method: by place or by name.
class Arguments {
 public:
  Arguments(const Call& call, std::initializer_list<const char*> names)
      : call_(call), names_(names.begin(), names.end()) {
    SADMM_CHECK(call.args.size() <= names_.size(), "args got ", call.args.size(), ", wanted at most ", names_.size());
    for (const auto& [key, value] : call.kwargs) {
      SADMM_CHECK(std::ranges::find(names_, key) != names_.end(), "argument got ", format::cut(key), ", wanted one of ",
                  list());
    }
  }

  const Value* find(const std::string& name) const {
    const auto at = static_cast<size_t>(std::ranges::find(names_, name) - names_.begin());
    if (at < call_.args.size()) return &call_.args[at];
    const auto it = call_.kwargs.find(name);
    return it == call_.kwargs.end() ? nullptr : &it->second;
  }
  const Value& get(const char* name) const {
    const Value* v = find(name);
    SADMM_CHECK(v, name, " got none, wanted a value");
    return *v;
  }
  bool flag(const char* name, bool other) const {
    const Value* v = find(name);
    if (!v) return other;
    SADMM_CHECK(v->is(VK::kBool), name, " got ", shown(*v), ", wanted True or False");
    return v->truth;
  }
  double number(const char* name, double other) const {
    const Value* v = find(name);
    if (!v) return other;
    SADMM_CHECK(v->is_number(), name, " got ", shown(*v), ", wanted a number");
    return v->number;
  }
  int64_t whole(const char* name, int64_t other) const {
    const Value* v = find(name);
    if (!v) return other;
    SADMM_CHECK(v->is(VK::kInt), name, " got ", shown(*v), ", wanted an integer");
    return v->integer;
  }
  // Refuses the argument, unless it is absent, None or False.
  void without(const char* name) const {
    const Value* v = find(name);
    SADMM_CHECK(!v || v->is_null() || (v->is(VK::kBool) && !v->truth), name, " got ", v ? shown(*v) : "",
                ", wanted none");
  }

 private:
  std::string list() const {
    std::string out;
    for (const std::string& n : names_) out += (out.empty() ? "" : ", ") + n;
    return out;
  }

  const Call& call_;
  std::vector<std::string> names_;
};

// One or two whole numbers within [low, 2^31).
std::array<int64_t, 2> pair_of(const char* name, const Value& v, int64_t low) {
  std::array<int64_t, 2> out{};
  const bool several = v.is_sequence() && (v.items.size() == 2 || v.items.size() == 1);
  for (size_t i = 0; i < 2; ++i) {
    const Value& item = several ? v.items[v.items.size() == 2 ? i : 0] : v;
    SADMM_CHECK(item.is(VK::kInt) && item.integer >= low && item.integer < int64_t{1} << 31, name, " got ", shown(item),
                ", wanted one or two integers of at least ", low);
    out[i] = item.integer;
  }
  return out;
}

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

Node node_of(Kind kind, std::vector<int> inputs) {
  Node node;
  node.kind = kind;
  node.inputs = std::move(inputs);
  return node;
}

class Lowering {
 public:
  Lowering(const Artefact& artefact, bool collect) : file_(artefact), collect_(collect) {
    items_.resize(file_.graph.size());
    consumers_.resize(file_.graph.size());
    for (size_t i = 0; i < file_.graph.size(); ++i) {
      const Call& call = file_.graph[i];
      for (const Value& v : call.args) note_consumers(v, static_cast<int>(i));
      for (const auto& [key, v] : call.kwargs) note_consumers(v, static_cast<int>(i));
    }
  }

  void run() {
    for (size_t i = 0; i < file_.graph.size(); ++i) {
      at_ = static_cast<int>(i);
      reasons_.emplace_back(file_.graph[i].name, "");
      try {
        items_[i] = item_of(file_.graph[i]);
      } catch (const Error& e) {
        if (!collect_) fail(file_.file, ": node ", file_.graph[i].name, ": ", e.what());
        reasons_.back().second = e.what();
        items_[i] = outside(static_cast<int>(i));
      }
    }
  }

  Graph graph() { return fuse(std::move(graph_), std::move(affine_)); }
  std::vector<std::pair<std::string, std::string>> reasons() { return std::move(reasons_); }

 private:
  void note_consumers(const Value& v, int i) {
    if (v.is(VK::kNode)) consumers_[static_cast<size_t>(v.integer)].push_back(i);
    for (const Value& item : v.items) note_consumers(item, i);
  }

  // Values of the runtime graph.

  int add(Node node, Affine affine = {}) {
    node.name = file_.graph[at_].op == Op::kCallModule ? file_.graph[at_].target : file_.graph[at_].name;
    graph_.nodes.push_back(std::move(node));
    affine_.push_back(std::move(affine));
    return static_cast<int>(graph_.nodes.size()) - 1;
  }

  Item tensor(int value, bool maps, int64_t channels, int64_t height = -1, int64_t width = -1) {
    Item item;
    item.kind = Item::Kind::kTensor;
    item.value = value;
    item.maps = maps;
    item.channels = channels;
    item.height = maps ? height : 1;
    item.width = maps ? width : 1;
    item.storage = at_;
    return item;
  }

  // The same sizes, another value.
  Item like(const Item& x, Node node, Affine affine = {}) {
    return tensor(add(std::move(node), std::move(affine)), x.maps, x.channels, x.height, x.width);
  }

  static bool is_pixel(const Item& x) { return x.maps && x.height == 1 && x.width == 1; }

  // An input of the graph: a placeholder, or in why_not what a refused node would have given.
  Item outside(int i) {
    Item x = tensor(-1, false, -1);
    const int64_t place =
        i < static_cast<int64_t>(file_.inputs.size()) && file_.graph[i].op == Op::kPlaceholder ? i : -1;
    if (place >= 0) {
      const format::Input& input = file_.inputs[static_cast<size_t>(place)];
      x.maps = input.shape.size() == 3;
      x.channels = input.shape.empty() ? -1 : input.shape[0];
    } else {
      guess(i, x);
    }
    if (x.maps) x.height = x.width = -1;
    x.value = add(node_of(Kind::kInput, {}));
    graph_.inputs.push_back(x.value);
    return x;
  }

  // Maps or features, and how many channels, as the first layer on the way says.
  void guess(int from, Item& x) const {
    std::vector<int> queue = {from};
    std::set<int> seen = {from};
    for (size_t next = 0; next < queue.size(); ++next) {
      for (const int c : consumers_[static_cast<size_t>(queue[next])]) {
        const Call& call = file_.graph[static_cast<size_t>(c)];
        const std::string name = call.target.substr(call.target.find('.') + 1);
        if (call.op == Op::kCallModule) {
          const Layer& layer = file_.layers.at(call.target);
          const bool flat = layer.kind.ends_with("Linear") || layer.kind == "BatchNorm1d";
          if (flat || layer.kind.find("2d") != std::string::npos) {
            for (const char* field : {"in_channels", "in_features", "num_features"}) {
              if (layer.config.contains(field)) x.channels = layer.config.at(field).integer;
            }
            x.maps = !flat;
            return;
          }
          if (layer.kind == "Flatten") continue;
        } else if (name.find("2d") != std::string::npos || name == "linear") {
          x.maps = name != "linear";
          return;
        } else if (name == "view" || name == "reshape" || name == "flatten" || name == "size" || name == "getattr") {
          continue;
        }
        if (seen.insert(c).second) queue.push_back(c);
      }
    }
  }

  // The tensor as a value of its own: picked channels by a convolution of ones. Zeros around it are the caller's
  // affair.
  Item plain(Item x) {
    if (!x.picked) return x;
    const auto out = static_cast<int64_t>(x.pick.size());
    const Item base = base_of(x);
    bool all = out == base.channels;
    for (int64_t c = 0; c < out && all; ++c) all = x.pick[static_cast<size_t>(c)] == c;
    Node node;
    node.inputs = {x.value};
    if (all) {
      node.kind = Kind::kPool;
      for (int d = 0; d < 2; ++d) node.pool.stride[d] = x.stride[d];
    } else {
      ConvSpec spec;
      spec.in_channels = base.channels;
      spec.out_channels = out;
      for (int d = 0; d < 2; ++d) spec.stride[d] = x.stride[d];
      spec.block_taps.push_back(0);
      for (int64_t c = 0; c < out;) {  // filters without a tap are one block
        int64_t end = c + 1;
        while (x.pick[c] < 0 && end < out && x.pick[end] < 0) ++end;
        if (x.pick[c] >= 0) {
          spec.taps.push_back(static_cast<int32_t>(x.pick[c]));
          spec.weight.push_back(1.0f);
        }
        spec.block_filters.push_back(static_cast<int32_t>(end - c));
        spec.block_taps.push_back(static_cast<int32_t>(spec.taps.size()));
        c = end;
      }
      node.kind = Kind::kConv;
      node.conv = std::make_shared<ConvSpec>(std::move(spec));
    }
    const int storage = x.storage;
    Item y = tensor(add(std::move(node)), true, out, x.height, x.width);
    y.storage = storage;
    return y;
  }

  Item base_of(const Item& x) const {
    Item base = x;
    base.channels = channels_of_.at(x.value);
    return base;
  }

  // Arguments of the call at hand.

  const Item& item(const Value& v) const {
    SADMM_CHECK(v.is(VK::kNode), "argument got ", shown(v), ", wanted a tensor");
    return items_[static_cast<size_t>(v.integer)];
  }

  bool is_tensor(const Value* v) const { return v && v->is(VK::kNode) && item(*v).kind == Item::Kind::kTensor; }
  bool is_constant(const Value* v) const { return v && v->is(VK::kNode) && item(*v).kind == Item::Kind::kConstant; }

  Item any_tensor(const Value& v) const {
    const Item& x = item(v);
    SADMM_CHECK(x.kind == Item::Kind::kTensor, "x got a size, a list or a constant, wanted a tensor");
    SADMM_CHECK(!x.overwritten, "x got a tensor that was overwritten in place, wanted one as it was made");
    return x;
  }

  Item operand(const Value& v) {
    const Item x = any_tensor(v);
    SADMM_CHECK(!x.pad[0] && !x.pad[1], "x got zeros around it, wanted them before a convolution");
    return plain(x);
  }

  Item maps(const Value& v) {
    Item x = operand(v);
    SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
    return x;
  }

  Item features(const Value& v) {
    Item x = operand(v);
    SADMM_CHECK(!x.maps, "x got [N, C, H, W], wanted [N, C]");
    return x;
  }

  const Stored* stored(const Value* v) const {
    if (!v || v->is_null()) return nullptr;
    SADMM_CHECK(is_constant(v), "weight got a tensor that the network computes, wanted a constant");
    return item(*v).constant;
  }

  // x changes in place: whoever reads the old value afterwards would see the new one.
  void overwrite(const Value& v) {
    const int storage = item(v).storage;
    SADMM_CHECK(file_.graph[static_cast<size_t>(storage)].op != Op::kPlaceholder && graph_input(storage) == false,
                "x got an input of the network to overwrite, wanted a value of its own");
    const auto mark = [storage](std::vector<Item>& items) {
      for (Item& x : items) x.overwritten = x.overwritten || (x.kind == Item::Kind::kTensor && x.storage == storage);
    };
    mark(items_);
    for (Item& x : items_) mark(x.list);
  }

  bool graph_input(int node) const {
    const Item& x = items_[static_cast<size_t>(node)];
    return x.kind == Item::Kind::kTensor && !x.picked &&
           graph_.nodes[static_cast<size_t>(x.value)].kind == Kind::kInput && x.storage == node;
  }

  // Dispatch.

  Item item_of(const Call& call) {
    Item result = item_before(call);
    if (result.kind == Item::Kind::kTensor && !result.picked && result.value >= 0) {
      channels_of_[result.value] = result.channels;
    }
    return result;
  }

  Item item_before(const Call& call) {
    switch (call.op) {
      case Op::kPlaceholder: {
        SADMM_CHECK(call.args.empty(), "placeholder got a default, wanted a tensor");
        const size_t i = static_cast<size_t>(at_);
        if (i < file_.inputs.size()) {
          const format::Input& input = file_.inputs[i];
          SADMM_CHECK(input.shape.size() == 1 || input.shape.size() == 3, "input got ", input.shape.size() + 1,
                      " dimensions, wanted [N, C, H, W] or [N, C]");
          SADMM_CHECK(input.element <= format::Element::kBf16 && input.element != format::Element::kF64, "input got ",
                      format::element_name(input.element), ", wanted float32, bfloat16 or float16");
        }
        return outside(at_);
      }
      case Op::kGetAttr: {
        Item x;
        x.kind = Item::Kind::kConstant;
        const auto it = file_.attributes.find(call.target);
        if (it != file_.attributes.end()) {
          x.constant = &it->second;
        } else {
          const size_t dot = call.target.rfind('.');
          x.constant = &file_.layers.at(call.target.substr(0, dot)).tensors.at(call.target.substr(dot + 1));
        }
        return x;
      }
      case Op::kCallModule:
        return module(call, file_.layers.at(call.target));
      case Op::kOutput:
        output(call.args[0]);
        return {};
      default:
        return function(call, call.target.substr(call.target.find('.') + 1));
    }
  }

  void output(const Value& v) {
    if (v.is_sequence()) {
      SADMM_CHECK(!v.items.empty(), "output got nothing, wanted tensors");
      for (const Value& item : v.items) {
        SADMM_CHECK(!item.is_sequence(), "output got lists within a list, wanted tensors");
        output(item);
      }
      return;
    }
    Item x = operand(v);
    // What the caller gets is never the memory that the caller gave.
    if (graph_.nodes[static_cast<size_t>(x.value)].kind == Kind::kInput) {
      x = like(x, node_of(Kind::kCopy, {x.value}));
    }
    graph_.outputs.push_back(x.value);
  }

  Item module(const Call& call, const Layer& layer) {
    SADMM_CHECK(call.args.size() + call.kwargs.size() == 1, "args got ", call.args.size() + call.kwargs.size(),
                ", wanted one tensor");
    const Value& x = call.args.empty() ? call.kwargs.begin()->second : call.args[0];
    const Config& c = layer.config;
    const std::string& kind = layer.kind;
    const auto bias = layer.tensors.find("bias");
    const Stored* b = bias == layer.tensors.end() ? nullptr : &bias->second;
    if (kind == "Conv2d" || kind == "CompactConv2d") {
      const bool dense = kind == "Conv2d";
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
      return conv(in, std::move(spec), b);
    }
    if (kind == "Linear" || kind == "CompactLinear") {
      LinearSpec spec;
      spec.in_features = c.at("in_features").integer;
      spec.out_features = c.at("out_features").integer;
      const Item in = features(x);
      if (kind == "Linear" && !collect_) compact_dense(spec, layer.tensors.at("weight"), spec.out_features, 1);
      if (kind != "Linear" && !collect_) take_tables(spec, layer);
      return linear(in, std::move(spec), b);
    }
    if (kind == "BatchNorm2d" || kind == "BatchNorm1d")
      return batch_norm(kind == "BatchNorm2d" ? maps(x) : features(x), layer);
    if (kind == "ChannelBias") {
      SADMM_CHECK(c.at("dim").integer == 1, "dim got ", c.at("dim").integer, ", wanted 1");
      const std::vector<float> shift = format::as_floats(*b);
      return scale_shift(operand(x), std::vector<double>(shift.size(), 1.0), {shift.begin(), shift.end()});
    }
    if (kind == "Identity" || kind.starts_with("Dropout")) return any_tensor(x);
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

  Item function(const Call& call, const std::string& name) {
    if (call.target == "getattr") return shape(call.args[0]);
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
      return activation(a.get("input"), clamp(a.number("min_val", -1), a.number("max_val", 1)),
                        a.flag("inplace", false));
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

  // Layers.

  void geometry(ConvSpec& spec, std::array<int64_t, 2> kernel, const Value& stride, const Value& padding,
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

  // The input of a convolution; zeros around it become padding.
  Item conv_input(const Value& v, ConvSpec& spec) {
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

  Item conv(const Item& x, ConvSpec spec, const Stored* bias) {
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

  Item linear(const Item& x, LinearSpec spec, const Stored* bias) {
    SADMM_CHECK(x.channels < 0 || x.channels == spec.in_features, "x got ", x.channels, " features, wanted ",
                spec.in_features);
    if (bias) spec.bias = format::as_floats(*bias);
    const int64_t features = spec.out_features;
    Node node = node_of(Kind::kLinear, {x.value});
    node.linear = std::make_shared<LinearSpec>(std::move(spec));
    return tensor(add(std::move(node)), false, features);
  }

  // F.conv2d and F.linear on constants.
  Item functional(const Call& call, bool is_conv) {
    const Arguments a = is_conv
                            ? Arguments(call, {"input", "weight", "bias", "stride", "padding", "dilation", "groups"})
                            : Arguments(call, {"input", "weight", "bias"});
    const Stored *weight = stored(&a.get("weight")), *bias = stored(a.find("bias"));
    SADMM_CHECK(weight && weight->shape.size() == (is_conv ? 4 : 2) && weight->numel() > 0,
                "weight got another shape, wanted ", is_conv ? "[O, C, H, W]" : "[O, N]");
    const int64_t filters = weight->shape[0];
    SADMM_CHECK(!bias || bias->shape == std::vector<int64_t>{filters}, "bias got another shape, wanted [", filters,
                "]");
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

  Item batch_norm(const Item& x, const Layer& layer) {
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

  // Before anything of that size is allocated: the channels of an input are only what the file says.
  static void check_channels(const Item& x) {
    SADMM_CHECK(x.channels >= 0, "x got an unknown number of channels, wanted the shapes of inputs in the file");
    SADMM_CHECK(x.channels <= kMany, "x got ", x.channels, " channels, wanted at most ", kMany);
  }

  std::vector<double> constants(const Item& x, double value) {
    check_channels(x);
    return std::vector<double>(static_cast<size_t>(x.channels), value);
  }

  Item scale_shift(const Item& x, std::vector<double> scale, std::vector<double> shift) {
    const auto n = static_cast<int64_t>(scale.size());
    SADMM_CHECK(x.channels < 0 || x.channels == n, "x got ", x.channels, " channels, wanted ", n);
    Node node = node_of(Kind::kScaleShift, {x.value});
    Item y = like(x, std::move(node), {std::move(scale), std::move(shift)});
    y.channels = n;
    return y;
  }

  Item activation(const Value& v, const Epilogue& epilogue, bool in_place) {
    const Item x = operand(v);
    if (in_place) overwrite(v);
    Node node = node_of(Kind::kCopy, {x.value});
    node.epilogue = epilogue;
    return like(x, std::move(node));
  }

  Item pool(const Item& x, bool max, const Value& kernel, const Value* stride, const Value* padding,
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

  Item adaptive_pool(const Item& x, bool max, const Value& size) {
    const auto out = pair_of("output_size", size, 1);
    return adaptive_pool(x, max, out[0], out[1]);
  }

  Item adaptive_pool(const Item& x, bool max, int64_t height, int64_t width) {
    Node node = node_of(Kind::kAdaptivePool, {x.value});
    node.pool.max = max;
    node.size[0] = height;
    node.size[1] = width;
    SADMM_CHECK(height < kFar && width < kFar, "output_size got ", height, ", ", width, ", wanted less than ", kFar);
    return tensor(add(std::move(node)), true, x.channels, height, width);
  }

  Item mean(const Arguments& a) {
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

  // Shapes.

  Item flat(const Item& x, int64_t features) {
    if (!x.maps) return x;
    Node node = node_of(Kind::kFlatten, {x.value});
    node.features = features;
    const bool known = x.channels >= 0 && x.height >= 0 && x.width >= 0;
    const int64_t n = known ? x.channels * x.height * x.width : features > 0 ? features : -1;
    SADMM_CHECK(!features || features == n, "shape got ", features, " features, wanted ", n);
    Item y = tensor(add(std::move(node)), false, n);
    y.storage = x.storage;
    return y;
  }

  // [N, C] as [N, C, 1, 1].
  Item unflat(const Item& x) {
    if (x.maps) return x;
    Item y = adaptive_pool(x, false, 1, 1);
    y.storage = x.storage;
    return y;
  }

  Item flatten(const Value& v, int64_t start, int64_t end) {
    const Item x = operand(v);
    const int64_t dims = x.maps ? 4 : 2;
    SADMM_CHECK(start == 1 || start == 1 - dims, "start_dim got ", start, ", wanted 1");
    SADMM_CHECK(end == -1 || end == dims - 1, "end_dim got ", end, ", wanted -1");
    return flat(x, 0);
  }

  Item number(int64_t n) {
    Item item;
    item.kind = Item::Kind::kSize;
    item.size.number = n;
    return item;
  }

  static Value number_value(int64_t n) {
    Value v;
    v.kind = VK::kInt;
    v.integer = n;
    v.number = static_cast<double>(n);
    return v;
  }

  Item dimension(const Item& x, int64_t d) {
    Item item = number(1);
    const int64_t known[] = {-1, x.channels, x.height, x.width};
    if (d == 0) {
      item.size.factors.insert({-1, 0});
    } else if (known[d] >= 0) {
      item.size.number = known[d];
    } else if (x.picked || x.pad[0] || x.pad[1]) {
      item.size.opaque = true;
    } else {
      item.size.factors.insert({x.value, static_cast<int>(d)});
    }
    return item;
  }

  Item shape(const Value& v) {
    const Item& x = item(v);
    SADMM_CHECK(x.kind == Item::Kind::kTensor, "x got no tensor, wanted one");
    Item out;
    out.kind = Item::Kind::kList;
    for (int64_t d = 0; d < (x.maps ? 4 : 2); ++d) out.list.push_back(dimension(x, d));
    return out;
  }

  Item size(const Arguments& a) {
    Item all = shape(a.get("self"));
    const Value* dim = a.find("dim");
    if (!dim) return all;
    return at(all, a.whole("dim", 0));
  }

  static Item at(const Item& list, int64_t i) {
    const auto n = static_cast<int64_t>(list.list.size());
    SADMM_CHECK(i >= -n && i < n, "index got ", i, ", wanted less than ", n);
    return list.list[static_cast<size_t>(i < 0 ? i + n : i)];
  }

  Item getitem(const Arguments& a) {
    const Item from = item(a.get("a"));
    const Value& index = a.get("b");
    if (from.kind == Item::Kind::kTensor) return slice(a.get("a"), index);
    SADMM_CHECK(from.kind == Item::Kind::kList, "x got no list, wanted one");
    if (index.is(VK::kInt)) return at(from, index.integer);
    SADMM_CHECK(index.is(VK::kSlice) && index.items[2].is_null(), "index got ", shown(index),
                ", wanted a number or a slice");
    const auto n = static_cast<int64_t>(from.list.size());
    const auto [begin, end] = range(index, n);
    Item out;
    out.kind = Item::Kind::kList;
    for (int64_t i = begin; i < end; ++i) out.list.push_back(from.list[static_cast<size_t>(i)]);
    return out;
  }

  static std::pair<int64_t, int64_t> range(const Value& s, int64_t n) {
    const auto bound = [&](const Value& v, int64_t other) {
      if (v.is_null()) return other;
      SADMM_CHECK(v.is(VK::kInt), "slice got ", shown(v), ", wanted integers");
      return std::clamp<int64_t>(v.integer < 0 ? v.integer + n : v.integer, 0, n);
    };
    const int64_t begin = bound(s.items[0], 0), end = bound(s.items[1], n);
    return {begin, std::max(begin, end)};
  }

  static bool is_all(const Value& s) {
    return s.is(VK::kEllipsis) ||
           (s.is(VK::kSlice) && s.items[0].is_null() && s.items[1].is_null() && s.items[2].is_null());
  }

  // x as a choice of channels, of every stride-th pixel.
  Item picked(const Value& v) {
    Item x = any_tensor(v);
    SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
    SADMM_CHECK(!x.pad[0] && !x.pad[1], "x got zeros around it, wanted them before a convolution");
    check_channels(x);
    if (!x.picked) {
      channels_of_[x.value] = x.channels;
      x.picked = true;
      for (int64_t c = 0; c < x.channels; ++c) x.pick.push_back(c);
    }
    return x;
  }

  Item slice(const Value& v, const Value& index) {
    const std::vector<Value> one = {index};
    const std::vector<Value>& parts = index.is_sequence() ? index.items : one;
    if (!any_tensor(v).maps) {
      const bool unflatten =
          parts.size() == 4 && is_all(parts[0]) && is_all(parts[1]) && parts[2].is_null() && parts[3].is_null();
      SADMM_CHECK(unflatten, "index got parts of [N, C], wanted [:, :, None, None]");
      return unflat(operand(v));
    }
    SADMM_CHECK(parts.size() <= 4, "index got ", parts.size(), " dimensions, wanted 4");
    Item x = picked(v);
    for (size_t d = 0; d < parts.size(); ++d) {
      const Value& s = parts[d];
      if (s.is(VK::kEllipsis)) {
        SADMM_CHECK(d + 1 == parts.size(), "index got an ellipsis before others, wanted it last");
        break;
      }
      SADMM_CHECK(s.is(VK::kSlice), "index got ", shown(s), ", wanted slices");
      if (is_all(s)) continue;
      SADMM_CHECK(d > 0, "index got a part of the batch, wanted all of it");
      if (d == 1) {
        SADMM_CHECK(s.items[2].is_null() || (s.items[2].is(VK::kInt) && s.items[2].integer == 1), "step got ",
                    shown(s.items[2]), ", wanted 1 along channels");
        const auto [begin, end] = range(s, x.channels);
        SADMM_CHECK(begin < end, "index got no channel, wanted some");
        x.pick = {x.pick.begin() + begin, x.pick.begin() + end};
        x.channels = end - begin;
      } else {
        SADMM_CHECK(s.items[0].is_null() || (s.items[0].is(VK::kInt) && s.items[0].integer == 0), "slice got ",
                    shown(s.items[0]), ", wanted whole rows and columns with a step");
        SADMM_CHECK(s.items[1].is_null(), "slice got ", shown(s.items[1]),
                    ", wanted whole rows and columns with a step");
        SADMM_CHECK(s.items[2].is(VK::kInt) && s.items[2].integer >= 1 && s.items[2].integer < kFar, "step got ",
                    shown(s.items[2]), ", wanted 1 to ", kFar - 1);
        const int64_t step = s.items[2].integer;
        x.stride[d - 2] *= step;
        SADMM_CHECK(x.stride[d - 2] < kFar, "step got ", x.stride[d - 2], ", wanted less than ", kFar);
        int64_t& size = d == 2 ? x.height : x.width;
        if (size >= 0) size = (size - 1) / step + 1;
      }
    }
    return x;
  }

  Item chunk(const Value& v, int64_t chunks, int64_t dim) {
    SADMM_CHECK(dim == 1 || dim == -3, "dim got ", dim, ", wanted 1");
    const Item x = picked(v);
    SADMM_CHECK(chunks >= 1 && chunks <= x.channels, "chunks got ", chunks, ", wanted 1 to ", x.channels);
    const int64_t size = (x.channels + chunks - 1) / chunks;
    Item bare = x;
    bare.pick.clear();
    Item out;
    out.kind = Item::Kind::kList;
    for (int64_t begin = 0; begin < x.channels; begin += size) {
      Item part = bare;
      part.pick = {x.pick.begin() + begin, x.pick.begin() + std::min(begin + size, x.channels)};
      part.channels = static_cast<int64_t>(part.pick.size());
      out.list.push_back(std::move(part));
    }
    return out;
  }

  Item shuffle(const Value& v, int64_t groups) {
    Item x = picked(v);
    SADMM_CHECK(x.channels % groups == 0, "groups got ", groups, ", wanted a divisor of ", x.channels, " channels");
    std::vector<int64_t> pick;
    for (int64_t c = 0; c < x.channels; ++c) {
      pick.push_back(x.pick[static_cast<size_t>(c % groups * (x.channels / groups) + c / groups)]);
    }
    x.pick = std::move(pick);
    x.storage = at_;
    return x;
  }

  // Widths as F.pad has them: left, right, top, bottom, channels before, behind.
  Item pad(const Value& v, std::vector<int64_t> widths) {
    SADMM_CHECK(widths.size() % 2 == 0 && widths.size() <= 6, "pad got ", widths.size(), " widths, wanted 2, 4 or 6");
    widths.resize(6);
    for (const int64_t w : widths) SADMM_CHECK(w < kFar, "pad got ", w, ", wanted less than ", kFar);
    SADMM_CHECK(widths[0] == widths[1] && widths[2] == widths[3],
                "pad got different widths on opposite sides, wanted the same");
    Item x = any_tensor(v);
    SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
    if (widths[4] || widths[5]) {
      x = picked(v);
      x.pick.insert(x.pick.begin(), static_cast<size_t>(widths[4]), -1);
      x.pick.insert(x.pick.end(), static_cast<size_t>(widths[5]), -1);
      x.channels += widths[4] + widths[5];
      check_channels(x);
    }
    if (widths[0] || widths[2]) {
      for (const int c : consumers_[static_cast<size_t>(at_)]) {
        const Call& call = file_.graph[static_cast<size_t>(c)];
        const auto layer = file_.layers.find(call.target);
        const bool conv =
            call.target == "F.conv2d" || (layer != file_.layers.end() && layer->second.kind.ends_with("Conv2d"));
        SADMM_CHECK(conv, "pad got a consumer, ", call.name, ", that is no convolution, wanted convolutions alone");
        // padding='same' means the sizes that it sees, zeros included.
      }
      x.pad[0] += widths[2];
      x.pad[1] += widths[0];
      if (x.height >= 0) x.height += 2 * widths[2];
      if (x.width >= 0) x.width += 2 * widths[0];
    }
    x.storage = at_;
    return x;
  }

  // view(x, a, b, ...) and view(x, (a, b, ...)): to [N, everything], or between [N, C] and [N, C, 1, 1].
  Item view(const Call& call) {
    SADMM_CHECK(!call.args.empty(), "args got none, wanted a tensor");
    const Item x = operand(call.args[0]);
    std::vector<Item> sizes;
    const auto take = [&](const Value& v) {
      if (v.is(VK::kInt)) {
        sizes.push_back(number(v.integer));
      } else {
        const Item& i = item(v);
        if (i.kind == Item::Kind::kList) {
          sizes.insert(sizes.end(), i.list.begin(), i.list.end());
        } else {
          sizes.push_back(i);
        }
      }
    };
    SADMM_CHECK(
        call.kwargs.empty() || (call.kwargs.size() == 1 && call.kwargs.contains("shape") && call.args.size() == 1),
        "argument got another name, wanted shape");
    for (size_t i = 1; i < call.args.size(); ++i) {
      if (!call.args[i].is_sequence()) take(call.args[i]);
      for (const Value& v : call.args[i].items) take(v);
    }
    for (const auto& [name, v] : call.kwargs) {
      if (!v.is_sequence()) take(v);
      for (const Value& s : v.items) take(s);
    }
    for (const Item& s : sizes) {
      SADMM_CHECK(s.kind == Item::Kind::kSize && !s.size.opaque, "shape got something else, wanted sizes");
    }
    SADMM_CHECK(sizes.size() == 2 || sizes.size() == 4, "shape got ", sizes.size(), " dimensions, wanted 2 or 4");

    // What one image has, as a product; one size may be -1 and is what is left.
    Size image = dimension(x, 1).size;
    for (int64_t d = 2; d < (x.maps ? 4 : 2); ++d) image = product(image, dimension(x, d).size);
    const auto is_free = [](const Item& s) { return s.size.is_number() && s.size.number == -1; };
    const bool free_batch = is_free(sizes[0]);
    SADMM_CHECK(free_batch || sizes[0].size.is_batch(),
                "shape got a fixed batch, wanted the size of dimension 0, or -1");
    Size rest = number(1).size;
    bool free = false;
    for (size_t d = 1; d < sizes.size(); ++d) {
      if (is_free(sizes[d])) {
        SADMM_CHECK(!free && !free_batch, "shape got -1 twice, wanted it once");
        free = true;
      } else {
        rest = product(rest, sizes[d].size);
      }
    }
    const bool same = rest.number == image.number && rest.factors == image.factors;
    if (sizes.size() == 4) {
      for (size_t d = 2; d < 4; ++d) {
        SADMM_CHECK(sizes[d].size.is_number() && sizes[d].size.number == 1,
                    "shape got maps, wanted [N, C, 1, 1] or [N, C]");
      }
      SADMM_CHECK(!x.maps || is_pixel(x), "x got [N, C, H, W], wanted [N, C] or maps of one pixel");
      SADMM_CHECK(free || same || image.factors.size() == 1, "shape got other sizes, wanted those of x");
      return x.maps ? x : unflat(x);
    }
    if (free || same) return flat(x, 0);
    // A number of features, where the sizes of maps are not known yet: the runtime checks it.
    SADMM_CHECK(rest.is_number() && rest.number > 0 && !image.is_number() && x.maps,
                "shape got other sizes, wanted all of an image in one");
    return flat(x, rest.number);
  }

  static Size product(Size a, const Size& b) {
    a.opaque = a.opaque || b.opaque || std::abs(static_cast<double>(a.number) * static_cast<double>(b.number)) > 1e15;
    a.number = a.opaque ? 1 : a.number * b.number;
    a.factors.insert(b.factors.begin(), b.factors.end());
    return a;
  }

  Item concat(const Value& tensors, int64_t dim) {
    SADMM_CHECK(tensors.is_sequence() && !tensors.items.empty(), "tensors got ", shown(tensors),
                ", wanted a list of them");
    Node node = node_of(Kind::kConcat, {});
    Item all;
    for (const Value& v : tensors.items) {
      const Item x = operand(v);
      node.inputs.push_back(x.value);
      if (node.inputs.size() == 1) {
        all = x;
        continue;
      }
      SADMM_CHECK(x.maps == all.maps, "tensors got [N, C] and [N, C, H, W], wanted one of them");
      all.channels = all.channels < 0 || x.channels < 0 ? -1 : all.channels + x.channels;
      if (all.height < 0) all.height = x.height;
      if (all.width < 0) all.width = x.width;
    }
    SADMM_CHECK(dim == 1 || dim == (all.maps ? -3 : -1), "dim got ", dim, ", wanted 1");
    return like(all, std::move(node));
  }

  // a + b and its kin: of two tensors, or of a tensor and a constant, or of sizes.
  Item arithmetic(const Call& call, const std::string& verb, bool in_place) {
    const Arguments a(call, {"a", "b", "alpha", "rounding_mode", "input", "other", "self"});
    SADMM_CHECK(a.number("alpha", 1) == 1, "alpha got ", a.number("alpha", 1), ", wanted 1");
    a.without("rounding_mode");
    SADMM_CHECK(call.args.size() <= 2, "args got ", call.args.size(), ", wanted 2");
    const Value* left = call.args.empty() ? a.find("input") : &call.args[0];
    const Value* right = call.args.size() < 2 ? a.find("other") : &call.args[1];
    SADMM_CHECK(left && right, "args got ", call.args.size(), ", wanted 2");
    const bool tensors[] = {is_tensor(left), is_tensor(right)};
    if (!tensors[0] && !tensors[1]) return size_arithmetic(*left, *right, verb);
    SADMM_CHECK(verb != "floordiv", "function got ", call.target, " of tensors, wanted one that the runtime has");
    SADMM_CHECK(!in_place || tensors[0], "x got a constant to overwrite, wanted a tensor");
    Item result = tensors[0] && tensors[1] ? of_tensors(operand(*left), operand(*right), verb)
                                           : with_constant(*left, *right, verb, tensors[0]);
    if (in_place) overwrite(*left);
    return result;
  }

  Item size_arithmetic(const Value& left, const Value& right, const std::string& verb) {
    const auto size_of = [&](const Value& v) {
      if (v.is(VK::kInt)) return number(v.integer).size;
      SADMM_CHECK(v.is(VK::kNode) && item(v).kind == Item::Kind::kSize, "argument got ", shown(v),
                  ", wanted a tensor or a size");
      return item(v).size;
    };
    const Size a = size_of(left), b = size_of(right);
    Item out = number(1);
    if (verb == "mul") {
      out.size = product(a, b);
    } else if (a.is_number() && b.is_number() && std::abs(a.number) < int64_t{1} << 40 &&
               std::abs(b.number) < int64_t{1} << 40 &&
               (verb == "add" || verb == "sub" || (verb == "floordiv" && b.number > 0 && a.number >= 0))) {
      out.size.number = verb == "add" ? a.number + b.number : verb == "sub" ? a.number - b.number : a.number / b.number;
    } else {
      out.size.opaque = true;
    }
    return out;
  }

  Item of_tensors(Item x, Item y, const std::string& verb) {
    SADMM_CHECK(verb != "div", "div got two tensors, wanted a constant divisor");
    SADMM_CHECK(x.maps == y.maps, "x got [N, C] and [N, C, H, W], wanted one of them");
    SADMM_CHECK(x.channels < 0 || y.channels < 0 || x.channels == y.channels, "x got ", x.channels, " and ", y.channels,
                " channels, wanted the same");
    if (verb == "mul") {
      if (is_pixel(x) && !is_pixel(y)) std::swap(x, y);
      Item out = like(x, node_of(Kind::kMultiply, {x.value, y.value}));
      if (out.channels < 0) out.channels = y.channels;
      return out;
    }
    SADMM_CHECK(is_pixel(x) == is_pixel(y), "x got maps and maps of one pixel, wanted the same sizes");
    if (verb == "sub") y = scale_shift(y, constants(y, -1), constants(y, 0));
    Node node = node_of(Kind::kCopy, {x.value, y.value});
    node.epilogue.residual = true;
    Item out = like(x, std::move(node));
    if (out.channels < 0) out.channels = y.channels;
    return out;
  }

  Item with_constant(const Value& left, const Value& right, const std::string& verb, bool tensor_first) {
    const Item x = operand(tensor_first ? left : right);
    const std::vector<double> c = per_channel(x, tensor_first ? right : left);
    std::vector<double> scale = constants(x, 1), shift = constants(x, 0);
    SADMM_CHECK(verb != "div" || tensor_first, "div got a tensor as divisor, wanted a constant");
    for (size_t i = 0; i < c.size(); ++i) {
      if (verb == "add") shift[i] = c[i];
      if (verb == "sub") shift[i] = tensor_first ? -c[i] : c[i];
      if (verb == "sub" && !tensor_first) scale[i] = -1;
      if (verb == "mul") scale[i] = c[i];
      if (verb == "div") scale[i] = 1 / c[i];
    }
    return scale_shift(x, std::move(scale), std::move(shift));
  }

  // A constant operand, one number for each channel of x.
  std::vector<double> per_channel(const Item& x, const Value& v) {
    if (v.is_number()) return constants(x, v.number);
    SADMM_CHECK(is_constant(&v), "argument got ", shown(v), ", wanted a tensor or a number");
    const Stored& t = *item(v).constant;
    SADMM_CHECK(t.element <= format::Element::kBf16, "constant got ", format::element_name(t.element),
                ", wanted a floating dtype");
    const size_t dims = x.maps ? 4 : 2;
    SADMM_CHECK(t.shape.size() <= dims, "constant got ", t.shape.size(), " dimensions, wanted at most ", dims);
    const std::vector<float> values = t.numel() <= x.channels ? format::as_floats(t) : std::vector<float>();
    if (values.size() == 1) return constants(x, values[0]);
    const auto at = static_cast<int64_t>(t.shape.size()) - (x.maps ? 3 : 1);
    SADMM_CHECK(x.channels >= 0 && t.numel() == x.channels && at >= 0 && t.shape[static_cast<size_t>(at)] == x.channels,
                "constant got ", t.numel(), " values, wanted one, or one for each of ", x.channels, " channels");
    return {values.begin(), values.end()};
  }

  const Artefact& file_;
  bool collect_;
  int at_ = 0;
  std::vector<Item> items_;
  std::vector<std::vector<int>> consumers_;
  std::map<int, int64_t> channels_of_;
  std::vector<std::pair<std::string, std::string>> reasons_;
  Graph graph_;
  std::vector<Affine> affine_;
};

}  // namespace

Graph lower(const Artefact& artefact) {
  Lowering lowering(artefact, false);
  lowering.run();
  return lowering.graph();
}

std::vector<std::pair<std::string, std::string>> why_not(const Artefact& artefact) {
  Lowering lowering(artefact, true);
  lowering.run();
  return lowering.reasons();
}

}  // namespace structadmm::runtime
