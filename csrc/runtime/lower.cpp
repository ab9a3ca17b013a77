// The walk over the graph of an artefact: one item a node, and what is told where a node cannot be lowered.
#include "runtime/lower.h"

#include "runtime/lowering.h"

namespace structadmm::runtime {
namespace lowering {

Lowering::Lowering(const Artefact& artefact, bool collect) : file_(artefact), collect_(collect) {
  items_.resize(file_.graph.size());
  consumers_.resize(file_.graph.size());
  for (size_t i = 0; i < file_.graph.size(); ++i) {
    const Call& call = file_.graph[i];
    for (const Value& v : call.args) note_consumers(v, static_cast<int>(i));
    for (const auto& [key, v] : call.kwargs) note_consumers(v, static_cast<int>(i));
  }
}

void Lowering::note_consumers(const Value& v, int i) {
  if (v.is(VK::kNode)) consumers_[static_cast<size_t>(v.integer)].push_back(i);
  for (const Value& item : v.items) note_consumers(item, i);
}

void Lowering::run() {
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

Item Lowering::item_of(const Call& call) {
  Item result = item_before(call);
  if (result.kind == Item::Kind::kTensor && !result.picked && result.value >= 0) {
    channels_of_[result.value] = result.channels;
  }
  return result;
}

Item Lowering::item_before(const Call& call) {
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

void Lowering::output(const Value& v) {
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

}  // namespace lowering

Graph lower(const format::Artefact& artefact) {
  lowering::Lowering all(artefact, false);
  all.run();
  return all.graph();
}

std::vector<std::pair<std::string, std::string>> why_not(const format::Artefact& artefact) {
  lowering::Lowering all(artefact, true);
  all.run();
  return all.reasons();
}

}  // namespace structadmm::runtime
