// From a graph and the tensors of a call to steps on memory: halos, places, images at a time.
//
// Nodes run in *stages*: consecutive nodes that suit the same number of images at a time (few where maps are large, so
// that a chunk's activations stay in the L2 cache; many where weights outweigh them, so that weights are read once for
// several images). A value that stays within its stage lives in a *local* arena, one per thread, sized for a chunk; one
// that crosses stages lives in the *shared* arena, sized for the batch. Where there are chunks enough, threads take
// chunks; elsewhere they share each step.
//
// Two values share a place if their lives do not overlap and either their planes are the same (so that the zeros of the
// halo stay true) or both have no halo.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/isa.h"
#include "base/tensor_view.h"
#include "ops/planes.h"
#include "ops/step.h"
#include "runtime/graph.h"

namespace structadmm::runtime {

// Where a step finds an operand. The chunk that begins at image i reads from `offset + i * image_bytes`.
struct Operand {
  enum class Where { kInput, kOutput, kShared, kLocal };
  Where where = Where::kLocal;
  int index = 0;            // of the caller's tensor
  int64_t offset = 0;       // bytes
  int64_t image_bytes = 0;  // 0 in the local arena
};

struct PlannedStep {
  int node = 0;
  std::unique_ptr<Step> step;
  std::vector<Operand> inputs;
  Operand output;
  int64_t bytes = 0;     // of the values read and written per image
  bool imports = false;  // reads so much of the caller's images that they are worth fetching as a whole
};

struct Stage {
  int64_t images = 1;  // at a time
  std::vector<PlannedStep> steps;
};

struct Plan {
  int64_t batch = 0;
  int threads = 1;  // that the chunks were sized for
  std::vector<Stage> stages;
  int64_t shared_bytes = 0, local_bytes = 0;
};

// What a plan asks of the engine: packed weights, made once for all plans.
struct Weights {
  std::function<const PackedConv&(int node)> conv;
  std::function<const PackedLinear&(int node)> linear;
};

// Whether the planner runs this convolution as a linear layer: 1 x 1 on a map of one pixel.
bool as_linear(const ConvSpec& conv, const std::vector<int64_t>& x);

// shapes: of every node (infer_shapes). inputs, outputs: the caller's tensors, batch first; their pointers are not
// used.
Plan make_plan(const Graph& graph, const std::vector<std::vector<int64_t>>& shapes,
               const std::vector<TensorView>& inputs, const std::vector<TensorView>& outputs, Dtype dtype, Isa isa,
               int threads, const Weights& weights);

}  // namespace structadmm::runtime
