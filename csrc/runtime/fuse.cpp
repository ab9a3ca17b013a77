#include "runtime/fuse.h"

#include <utility>

namespace structadmm::runtime {
namespace {

// Blocks of filters of a compacted weight with the weights of each filter scaled: W[f] *= scale[f], bias as the formula
// says.
template <class Spec>
void scale_filters(Spec& spec, int64_t filters, const Affine& a) {
  if (spec.bias.empty()) spec.bias.assign(static_cast<size_t>(filters), 0.0f);
  size_t w = 0, filter = 0;
  for (size_t b = 0; b < spec.block_filters.size(); ++b) {
    const auto taps = static_cast<size_t>(spec.block_taps[b + 1] - spec.block_taps[b]);
    for (int32_t i = 0; i < spec.block_filters[b]; ++i, ++filter) {
      for (size_t end = w + taps; w < end; ++w) spec.weight[w] = static_cast<float>(spec.weight[w] * a.scale[filter]);
      spec.bias[filter] = static_cast<float>(spec.bias[filter] * a.scale[filter] + a.shift[filter]);
    }
  }
}

class Fuser {
 public:
  Fuser(Graph graph, std::vector<Affine> affine) : from_(std::move(graph)), affine_(std::move(affine)) {}

  Graph run() {
    uses_.assign(from_.nodes.size(), 0);
    for (const Node& node : from_.nodes) {
      for (const int i : node.inputs) ++uses_[i];
    }
    for (const int i : from_.outputs) ++uses_[i];
    for (size_t i = 0; i < from_.nodes.size(); ++i) place_.push_back(place(static_cast<int>(i)));
    return alive();
  }

 private:
  // The node of `to_` that a node may still change: the only consumer of `i` asks.
  Node* changeable(int i) { return uses_[i] == 1 ? &to_[place_[i]] : nullptr; }

  static bool has_weight(const Node& n) { return n.kind == Kind::kConv || n.kind == Kind::kLinear; }

  static const Epilogue& epilogue_of(const Node& n) {
    return n.kind == Kind::kConv ? n.conv->epilogue : n.kind == Kind::kLinear ? n.linear->epilogue : n.epilogue;
  }

  // Specifications are shared with nobody yet: lowering made one for each node.
  static ConvSpec& conv(Node& n) { return const_cast<ConvSpec&>(*n.conv); }
  static LinearSpec& linear(Node& n) { return const_cast<LinearSpec&>(*n.linear); }

  static Epilogue& epilogue(Node& n) {
    return n.kind == Kind::kConv ? conv(n).epilogue : n.kind == Kind::kLinear ? linear(n).epilogue : n.epilogue;
  }

  static bool activated(const Node& n) {
    Epilogue e = epilogue_of(n);
    e.residual = false;
    return !e.none();
  }

  int add(Node node, Affine affine = {}) {
    to_.push_back(std::move(node));
    to_affine_.push_back(std::move(affine));
    return static_cast<int>(to_.size()) - 1;
  }

  // Where the value of from_.nodes[i] is in to_.
  int place(int i) {
    Node node = from_.nodes[i];
    if (node.kind == Kind::kScaleShift && fold(i, node)) return place_[node.inputs[0]];
    if (node.kind == Kind::kCopy && !node.epilogue.residual && activate(node)) return place_[node.inputs[0]];
    if (node.kind == Kind::kCopy && node.epilogue.residual) {
      if (const int at = add_residual(node); at >= 0) return at;
    }
    for (int& input : node.inputs) input = place_[input];
    return add(std::move(node), std::move(affine_[i]));
  }

  bool fold(int i, const Node& node) {
    Node* before = changeable(node.inputs[0]);
    if (!before || !epilogue_of(*before).none()) return false;
    const Affine& a = affine_[i];
    if (before->kind == Kind::kConv) {
      scale_filters(conv(*before), before->conv->out_channels, a);
    } else if (before->kind == Kind::kLinear) {
      scale_filters(linear(*before), before->linear->out_features, a);
    } else if (before->kind == Kind::kScaleShift) {
      Affine& b = to_affine_[place_[node.inputs[0]]];
      for (size_t c = 0; c < b.scale.size(); ++c) {
        b.scale[c] *= a.scale[c];
        b.shift[c] = b.shift[c] * a.scale[c] + a.shift[c];
      }
    } else {
      return false;
    }
    return true;
  }

  bool activate(const Node& node) {
    Node* before = changeable(node.inputs[0]);
    if (!before || activated(*before)) return false;
    if (!has_weight(*before) && before->kind != Kind::kCopy && before->kind != Kind::kMultiply &&
        before->kind != Kind::kScaleShift) {
      return false;
    }
    const bool residual = epilogue_of(*before).residual;
    epilogue(*before) = node.epilogue;
    epilogue(*before).residual = residual;
    return true;
  }

  // The sum of two values becomes the epilogue of the one that is computed last, moved here so that the other is there.
  int add_residual(const Node& node) {
    int chosen = -1;
    for (int k = 0; k < 2; ++k) {
      const Node* n = changeable(node.inputs[k]);
      if (!n || !has_weight(*n) || !epilogue_of(*n).none()) continue;
      if (chosen < 0 || place_[node.inputs[k]] > place_[node.inputs[chosen]]) chosen = k;
    }
    if (chosen < 0) return -1;
    Node moved = to_[place_[node.inputs[chosen]]];
    moved.inputs.push_back(place_[node.inputs[1 - chosen]]);
    epilogue(moved) = node.epilogue;
    return add(std::move(moved));
  }

  Graph alive() {
    std::vector<char> live(to_.size(), 0);
    for (const int i : from_.outputs) live[place_[i]] = 1;
    for (const int i : from_.inputs) live[place_[i]] = 1;
    for (size_t i = to_.size(); i-- > 0;) {
      if (!live[i]) continue;
      for (const int input : to_[i].inputs) live[input] = 1;
    }
    Graph graph;
    std::vector<int> index(to_.size(), -1);
    for (size_t i = 0; i < to_.size(); ++i) {
      if (!live[i]) continue;
      index[i] = static_cast<int>(graph.nodes.size());
      for (int& input : to_[i].inputs) input = index[input];
      if (to_[i].kind == Kind::kScaleShift) {
        to_[i].scale.assign(to_affine_[i].scale.begin(), to_affine_[i].scale.end());
        to_[i].shift.assign(to_affine_[i].shift.begin(), to_affine_[i].shift.end());
      }
      graph.nodes.push_back(std::move(to_[i]));
    }
    for (const int i : from_.inputs) graph.inputs.push_back(index[place_[i]]);
    for (const int i : from_.outputs) graph.outputs.push_back(index[place_[i]]);
    return graph;
  }

  Graph from_;
  std::vector<Affine> affine_, to_affine_;
  std::vector<int> uses_, place_;
  std::vector<Node> to_;
};

}  // namespace

Graph fuse(Graph graph, std::vector<Affine> affine) {
  return Fuser(std::move(graph), std::move(affine)).run();
}

Graph subsample_first(Graph from, const std::function<bool(const Node&)>& reads_strides) {
  // Multiply-adds per pixel read below which the copy is taken to cost more than it saves. Measured once, at 128
  // (ResNet-50's shortcuts): a quarter less time with the copy; the limit itself is an estimate.
  constexpr size_t kWorth = 16;
  Graph to;
  std::vector<int> place;
  for (Node& n : from.nodes) {
    for (int& input : n.inputs) input = place[input];
    const bool pointwise = n.kind == Kind::kConv && n.conv->kernel[0] == 1 && n.conv->kernel[1] == 1 &&
                           n.conv->padding[0] == 0 && n.conv->padding[1] == 0;
    const auto strides = pointwise ? static_cast<size_t>(n.conv->stride[0] * n.conv->stride[1]) : 1;
    if (strides > 1 && !reads_strides(n) &&
        n.conv->weight.size() >= kWorth * strides * static_cast<size_t>(n.conv->in_channels)) {
      Node pixels;
      pixels.kind = Kind::kPool;
      pixels.name = n.name;
      pixels.inputs = {n.inputs[0]};
      for (int axis : {0, 1}) pixels.pool.stride[axis] = n.conv->stride[axis];
      auto conv = std::make_shared<ConvSpec>(*n.conv);
      conv->stride[0] = conv->stride[1] = 1;
      n.conv = std::move(conv);
      n.inputs[0] = static_cast<int>(to.nodes.size());
      to.nodes.push_back(std::move(pixels));
    }
    place.push_back(static_cast<int>(to.nodes.size()));
    to.nodes.push_back(std::move(n));
  }
  for (const int i : from.inputs) to.inputs.push_back(place[i]);
  for (const int i : from.outputs) to.outputs.push_back(place[i]);
  return to;
}

}  // namespace structadmm::runtime
