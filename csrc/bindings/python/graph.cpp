// _core: what an artefact is lowered to, as dicts, and what cannot be lowered and why. For tests and for optimize.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "base/check.h"
#include "bindings/python/bind.h"
#include "format/allowed.h"
#include "format/artefact.h"
#include "runtime/graph.h"
#include "runtime/lower.h"

namespace structadmm::bindings {
namespace {

namespace py = pybind11;
using runtime::Kind;
using runtime::Node;

std::span<const std::byte> bytes_of(const py::buffer_info& info) {
  SADMM_CHECK(info.ndim == 1 && info.itemsize == 1 && (info.shape[0] == 0 || info.strides[0] == 1),
              "artefact got another buffer, wanted contiguous bytes");
  return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size)};
}

py::dict epilogue_of(const Epilogue& e) {
  constexpr const char* kNames[] = {"clamp",       "silu",    "gelu", "gelu_tanh", "hardswish",
                                    "hardsigmoid", "sigmoid", "tanh", "leaky_relu"};
  py::dict d;
  if (e.activation != Activation::kClamp) {
    d["activation"] = kNames[static_cast<int>(e.activation)];
    if (e.activation == Activation::kLeakyRelu) d["slope"] = e.slope;
  } else if (e.low != -std::numeric_limits<float>::infinity() || e.high != std::numeric_limits<float>::infinity()) {
    d["clamp"] = py::make_tuple(e.low, e.high);
  }
  if (e.residual) d["residual"] = true;
  return d;
}

template <class T>
py::array_t<T> array(const std::vector<T>& v) {
  return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

template <class Spec>
void put_weights(py::dict& d, const Spec& spec) {
  d["weight"] = array(spec.weight);
  d["bias"] = array(spec.bias);
  d["taps"] = array(spec.taps);
  d["block_filters"] = array(spec.block_filters);
  d["block_taps"] = array(spec.block_taps);
  d["epilogue"] = epilogue_of(spec.epilogue);
}

py::tuple pair(const int64_t (&v)[2]) {
  return py::make_tuple(v[0], v[1]);
}

py::dict node_of(const Node& n) {
  constexpr const char* kKinds[] = {"input", "conv",     "linear",      "pool",   "adaptive_pool",
                                    "copy",  "multiply", "scale_shift", "concat", "flatten"};
  py::dict d;
  d["kind"] = kKinds[static_cast<int>(n.kind)];
  d["name"] = n.name;
  d["inputs"] = n.inputs;
  switch (n.kind) {
    case Kind::kConv:
      d["in_channels"] = n.conv->in_channels;
      d["out_channels"] = n.conv->out_channels;
      d["groups"] = n.conv->groups;
      d["kernel"] = pair(n.conv->kernel);
      d["stride"] = pair(n.conv->stride);
      d["padding"] = pair(n.conv->padding);
      d["dilation"] = pair(n.conv->dilation);
      d["family"] = n.family;
      put_weights(d, *n.conv);
      break;
    case Kind::kLinear:
      d["in_features"] = n.linear->in_features;
      d["out_features"] = n.linear->out_features;
      put_weights(d, *n.linear);
      break;
    case Kind::kPool:
      d["max"] = n.pool.max;
      d["kernel"] = pair(n.pool.kernel);
      d["stride"] = pair(n.pool.stride);
      d["padding"] = pair(n.pool.padding);
      d["dilation"] = pair(n.pool.dilation);
      d["ceil_mode"] = n.ceil_mode;
      d["count_include_pad"] = n.pool.count_include_pad;
      d["divisor_override"] = n.pool.divisor_override;
      break;
    case Kind::kAdaptivePool:
      d["max"] = n.pool.max;
      d["size"] = pair(n.size);
      break;
    case Kind::kScaleShift:
      d["scale"] = array(n.scale);
      d["shift"] = array(n.shift);
      d["epilogue"] = epilogue_of(n.epilogue);
      break;
    case Kind::kCopy:
    case Kind::kMultiply:
      d["epilogue"] = epilogue_of(n.epilogue);
      break;
    case Kind::kFlatten:
      d["features"] = n.features;
      break;
    default:
      break;
  }
  return d;
}

py::dict lower(const py::buffer& artefact) {
  const py::buffer_info info = artefact.request();
  const runtime::Graph graph = runtime::lower(format::read(bytes_of(info), "lower"));
  py::list nodes;
  for (const Node& n : graph.nodes) nodes.append(node_of(n));
  py::dict d;
  d["nodes"] = nodes;
  d["inputs"] = graph.inputs;
  d["outputs"] = graph.outputs;
  return d;
}

std::vector<std::vector<int64_t>> shapes(const py::buffer& artefact, const std::vector<std::vector<int64_t>>& inputs) {
  const py::buffer_info info = artefact.request();
  const runtime::Graph graph = runtime::lower(format::read(bytes_of(info), "lower_shapes"));
  return runtime::infer_shapes(graph, inputs);
}

py::dict why_not(const py::buffer& artefact) {
  const py::buffer_info info = artefact.request();
  py::dict d;
  for (const auto& [name, reason] : runtime::why_not(format::read(bytes_of(info), "why_not"))) {
    d[py::str(name)] = reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
  }
  return d;
}

py::dict allowed() {
  py::dict kinds;
  for (const format::LayerKind& kind : format::layer_kinds()) {
    py::list fields;
    for (const format::Field& f : kind.fields) fields.append(std::string(f.name));
    kinds[py::str(std::string(kind.name))] = fields;
  }
  py::dict d;
  d["kinds"] = kinds;
  py::list functions, methods;
  for (const std::string& name : format::functions()) functions.append(name);
  for (const std::string& name : format::methods()) methods.append(name);
  d["functions"] = functions;
  d["methods"] = methods;
  return d;
}

}  // namespace

void bind_graph(py::module_& m) {
  m.def("lower", &lower, py::arg("artefact"), "The runtime graph of an artefact's bytes: nodes, inputs, outputs.");
  m.def("lower_shapes", &shapes, py::arg("artefact"), py::arg("inputs"),
        "The shape of every node's value, without the batch, for inputs of these shapes.");
  m.def("why_not", &why_not, py::arg("artefact"),
        "For each node of an artefact's graph None, or why the runtime cannot hold it.");
  m.def("allowed", &allowed, "Layers with their fields, functions and methods that an artefact may hold.");
}

}  // namespace structadmm::bindings
