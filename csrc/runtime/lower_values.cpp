// Values of the runtime graph, and the arguments of the call at hand as values.
#include "runtime/lowering.h"

#include <array>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "format/allowed.h"

namespace structadmm::runtime::lowering {

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

Node node_of(Kind kind, std::vector<int> inputs) {
  Node node;
  node.kind = kind;
  node.inputs = std::move(inputs);
  return node;
}

int Lowering::add(Node node, Affine affine) {
  node.name = file_.graph[at_].op == Op::kCallModule ? file_.graph[at_].target : file_.graph[at_].name;
  graph_.nodes.push_back(std::move(node));
  affine_.push_back(std::move(affine));
  return static_cast<int>(graph_.nodes.size()) - 1;
}

Item Lowering::tensor(int value, bool maps, int64_t channels, int64_t height, int64_t width) {
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

Item Lowering::like(const Item& x, Node node, Affine affine) {
  return tensor(add(std::move(node), std::move(affine)), x.maps, x.channels, x.height, x.width);
}

Item Lowering::outside(int i) {
  Item x = tensor(-1, false, -1);
  const int64_t place = i < static_cast<int64_t>(file_.inputs.size()) && file_.graph[i].op == Op::kPlaceholder ? i : -1;
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

void Lowering::guess(int from, Item& x) const {
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

const Item& Lowering::item(const Value& v) const {
  SADMM_CHECK(v.is(VK::kNode), "argument got ", shown(v), ", wanted a tensor");
  return items_[static_cast<size_t>(v.integer)];
}

Item Lowering::any_tensor(const Value& v) const {
  const Item& x = item(v);
  SADMM_CHECK(x.kind == Item::Kind::kTensor, "x got a size, a list or a constant, wanted a tensor");
  SADMM_CHECK(!x.overwritten, "x got a tensor that was overwritten in place, wanted one as it was made");
  return x;
}

Item Lowering::operand(const Value& v) {
  const Item x = any_tensor(v);
  SADMM_CHECK(!x.pad[0] && !x.pad[1], "x got zeros around it, wanted them before a convolution");
  return plain(x);
}

Item Lowering::maps(const Value& v) {
  Item x = operand(v);
  SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
  return x;
}

Item Lowering::features(const Value& v) {
  Item x = operand(v);
  SADMM_CHECK(!x.maps, "x got [N, C, H, W], wanted [N, C]");
  return x;
}

const Stored* Lowering::stored(const Value* v) const {
  if (!v || v->is_null()) return nullptr;
  SADMM_CHECK(is_constant(v), "weight got a tensor that the network computes, wanted a constant");
  return item(*v).constant;
}

void Lowering::overwrite(const Value& v) {
  const int storage = item(v).storage;
  SADMM_CHECK(file_.graph[static_cast<size_t>(storage)].op != Op::kPlaceholder && graph_input(storage) == false,
              "x got an input of the network to overwrite, wanted a value of its own");
  const auto mark = [storage](std::vector<Item>& items) {
    for (Item& x : items) x.overwritten = x.overwritten || (x.kind == Item::Kind::kTensor && x.storage == storage);
  };
  mark(items_);
  for (Item& x : items_) mark(x.list);
}

bool Lowering::graph_input(int node) const {
  const Item& x = items_[static_cast<size_t>(node)];
  return x.kind == Item::Kind::kTensor && !x.picked &&
         graph_.nodes[static_cast<size_t>(x.value)].kind == Kind::kInput && x.storage == node;
}

}  // namespace structadmm::runtime::lowering
