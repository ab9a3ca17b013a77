// The lowering's own header: what a node of an artefact is to the nodes behind it, and the class that lower*.cpp share.
//
//   lower.cpp             the walk over the graph
//   lower_calls.cpp       layers and functions by name
//   lower_values.cpp      values of the runtime graph, operands of a call
//   lower_layers.cpp      convolution, linear, BatchNorm, activation, pooling
//   lower_channels.cpp    slices, chunk, shuffle, pad, cat
//   lower_shapes.cpp      sizes and reshapes
//   lower_arithmetic.cpp  + - * / and constants
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "format/allowed.h"
#include "format/artefact.h"
#include "runtime/fuse.h"
#include "runtime/graph.h"

namespace structadmm::runtime::lowering {

using format::Artefact;
using format::Call;
using format::Config;
using format::Layer;
using format::Op;
using format::Stored;
using format::Value;
using VK = Value::Kind;

// Padding and reach of a kernel: more is no network, and would be halos of gigabytes.
inline constexpr int64_t kFar = 1 << 14;
// Channels of a value that the lowering handles one by one.
inline constexpr int64_t kMany = 1 << 20;

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
  enum class Kind { kAbsent, kTensor, kConstant, kSize, kList };
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
};

// A value as errors show it.
std::string shown(const Value& v);

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
std::array<int64_t, 2> pair_of(const char* name, const Value& v, int64_t low);

Node node_of(Kind kind, std::vector<int> inputs);

// Walks the calls of an artefact in order; throws Error with the cause alone, run() says at which node.
class Lowering {
 public:
  // collect: go on behind a node that cannot be lowered, and read no weights.
  Lowering(const Artefact& artefact, bool collect);

  void run();
  Graph graph() { return fuse(std::move(graph_), std::move(affine_)); }
  std::vector<std::pair<std::string, std::string>> reasons() { return std::move(reasons_); }

 private:
  // lower.cpp
  void note_consumers(const Value& v, int i);
  Item item_of(const Call& call);
  Item item_before(const Call& call);
  void output(const Value& v);

  // lower_calls.cpp
  Item module(const Call& call, const Layer& layer);
  Item function(const Call& call, const std::string& name);

  // lower_values.cpp
  int add(Node node, Affine affine = {});
  Item tensor(int value, bool maps, int64_t channels, int64_t height = -1, int64_t width = -1);
  // The same sizes, another value.
  Item like(const Item& x, Node node, Affine affine = {});
  // An input of the graph: a placeholder, or in why_not what a refused node would have given.
  Item outside(int i);
  // Maps or features, and how many channels, as the first layer on the way says.
  void guess(int from, Item& x) const;
  const Item& item(const Value& v) const;
  Item any_tensor(const Value& v) const;
  Item operand(const Value& v);
  Item maps(const Value& v);
  Item features(const Value& v);
  const Stored* stored(const Value* v) const;
  // x changes in place: whoever reads the old value afterwards would see the new one.
  void overwrite(const Value& v);
  bool graph_input(int node) const;
  static bool is_pixel(const Item& x) { return x.maps && x.height == 1 && x.width == 1; }
  bool is_tensor(const Value* v) const { return v && v->is(VK::kNode) && item(*v).kind == Item::Kind::kTensor; }
  bool is_constant(const Value* v) const { return v && v->is(VK::kNode) && item(*v).kind == Item::Kind::kConstant; }

  // lower_layers.cpp
  Item conv_layer(const Value& x, const Layer& layer, const Stored* bias);
  Item linear_layer(const Value& x, const Layer& layer, const Stored* bias);
  void geometry(ConvSpec& spec, std::array<int64_t, 2> kernel, const Value& stride, const Value& padding,
                const Value& dilation, int64_t groups);
  // The input of a convolution; zeros around it become padding.
  Item conv_input(const Value& v, ConvSpec& spec);
  Item conv(const Item& x, ConvSpec spec, const Stored* bias);
  Item linear(const Item& x, LinearSpec spec, const Stored* bias);
  // F.conv2d and F.linear on constants.
  Item functional(const Call& call, bool is_conv);
  Item batch_norm(const Item& x, const Layer& layer);
  Item activation(const Value& v, const Epilogue& epilogue, bool in_place);
  Item pool(const Item& x, bool max, const Value& kernel, const Value* stride, const Value* padding,
            const Value* dilation, bool ceil_mode, bool count_include_pad, int64_t divisor);
  Item adaptive_pool(const Item& x, bool max, const Value& size);
  Item adaptive_pool(const Item& x, bool max, int64_t height, int64_t width);
  Item mean(const Arguments& a);

  // lower_channels.cpp
  // The tensor as a value of its own: picked channels by a convolution of ones. Zeros around it are the caller's
  // affair.
  Item plain(Item x);
  Item base_of(const Item& x) const;
  // Before anything of that size is allocated: the channels of an input are only what the file says.
  static void check_channels(const Item& x);
  // x as a choice of channels, of every stride-th pixel.
  Item picked(const Value& v);
  Item slice(const Value& v, const Value& index);
  Item chunk(const Value& v, int64_t chunks, int64_t dim);
  Item shuffle(const Value& v, int64_t groups);
  // Widths as F.pad has them: left, right, top, bottom, channels before, behind.
  Item pad(const Value& v, std::vector<int64_t> widths);
  Item concat(const Value& tensors, int64_t dim);

  // lower_shapes.cpp
  Item number(int64_t n);
  static Value number_value(int64_t n);
  static Size product(Size a, const Size& b);
  Item dimension(const Item& x, int64_t d);
  Item shape(const Value& v);
  Item size(const Arguments& a);
  static Item at(const Item& list, int64_t i);
  static std::pair<int64_t, int64_t> range(const Value& s, int64_t n);
  static bool is_all(const Value& s);
  Item getitem(const Arguments& a);
  Item flat(const Item& x, int64_t features);
  // [N, C] as [N, C, 1, 1].
  Item unflat(const Item& x);
  Item flatten(const Value& v, int64_t start, int64_t end);
  // view(x, a, b, ...) and view(x, (a, b, ...)): to [N, everything], or between [N, C] and [N, C, 1, 1].
  Item view(const Call& call);

  // lower_arithmetic.cpp
  // a + b and its kin: of two tensors, or of a tensor and a constant, or of sizes.
  Item arithmetic(const Call& call, const std::string& verb, bool in_place);
  Item size_arithmetic(const Value& left, const Value& right, const std::string& verb);
  Item of_tensors(Item x, Item y, const std::string& verb);
  Item with_constant(const Value& left, const Value& right, const std::string& verb, bool tensor_first);
  // A constant operand, one number for each channel of x.
  std::vector<double> per_channel(const Item& x, const Value& v);
  std::vector<double> constants(const Item& x, double value);
  Item scale_shift(const Item& x, std::vector<double> scale, std::vector<double> shift);

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

}  // namespace structadmm::runtime::lowering
