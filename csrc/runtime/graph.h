// The network, or a segment of one, as the runtime sees it: nodes in order of execution, each with one value per image.
//
// Shapes leave the batch out: {C, H, W}, or {features}. Made by runtime/lower.cpp from the manifest of an artefact, in
// which BatchNorm is folded and activations and residual additions are fused already.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/conv.h"
#include "ops/steps.h"

namespace structadmm::runtime {

enum class Kind {
  kInput,         // the next tensor of the caller
  kConv,          // inputs {x} or {x, residual}: `conv`
  kLinear,        // the same: `linear`
  kPool,          // `pool`
  kAdaptivePool,  // to size[0] x size[1], `pool.max`
  kCopy,          // `epilogue`; inputs {x} or {x, residual}: an activation, an addition
  kMultiply,      // `epilogue`; inputs {x, gate}
  kScaleShift,    // `scale`, `shift`, `epilogue`
  kConcat,        // along channels (or features)
  kFlatten,       // {C, H, W} to {C * H * W}
};

struct Node {
  Kind kind = Kind::kInput;
  std::string name;         // of the node or layer it came from, for reports
  std::vector<int> inputs;  // indices of earlier nodes
  std::shared_ptr<const ConvSpec> conv;
  std::shared_ptr<const LinearSpec> linear;
  Pool pool;
  bool ceil_mode = false;    // of kPool
  int64_t size[2] = {1, 1};  // of kAdaptivePool
  int64_t features = 0;      // of kFlatten: how many the network expects, 0 where it does not say
  std::vector<float> scale, shift;
  Epilogue epilogue;   // of kCopy, kMultiply, kScaleShift
  std::string family;  // of kConv: "" lets the runtime choose; else "taps", "winograd", "depthwise", "nonzeros"
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<int> inputs;   // kInput nodes in the order of the caller's tensors
  std::vector<int> outputs;  // nodes whose values the caller gets, in order
};

// The shape of every node's value for inputs of these shapes. Throws Error naming the node where one does not fit.
std::vector<std::vector<int64_t>> infer_shapes(const Graph& graph, const std::vector<std::vector<int64_t>>& inputs);

}  // namespace structadmm::runtime
