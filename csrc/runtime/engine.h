// Runs a graph: plans it for a shape and batch (planner.h), keeps packed weights, plans and arenas, and executes
// without allocating.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/isa.h"
#include "base/parallel.h"
#include "base/tensor_view.h"
#include "runtime/graph.h"

namespace structadmm::runtime {

struct EngineOptions {
  Dtype dtype = Dtype::kF32;  // of the values inside: f32, or bf16 (inputs and outputs stay as the caller has them)
  std::optional<Isa> isa;     // none: the current one
};

class Engine {
 public:
  explicit Engine(Graph graph, EngineOptions options = {});
  ~Engine();
  Engine(Engine&&) noexcept;

  const Graph& graph() const;
  const EngineOptions& options() const;

  // Sizes of the outputs, batch first, for inputs [N, C, H, W] or [N, features] of these sizes. Throws Error.
  std::vector<std::vector<int64_t>> output_sizes(std::span<const TensorView> inputs) const;

  // inputs: f32, bf16 or f16, any strides; outputs: of output_sizes, any strides. May be called from several threads at
  // once. Throws Error where a tensor does not fit; nothing is written then.
  void run(std::span<const TensorView> inputs, std::span<const TensorView> outputs, Parallel& parallel) const;

  // What a plan for these inputs consists of: per step the node's name, the kernel, images at a time, bytes.
  struct StepInfo {
    std::string node, kernel;
    int64_t images, bytes;
  };
  std::vector<StepInfo> describe(std::span<const TensorView> inputs) const;
  int64_t arena_bytes(std::span<const TensorView> inputs) const;

  // Seconds of each step of describe(), the fastest of `repeats` runs.
  std::vector<double> profile(std::span<const TensorView> inputs, std::span<const TensorView> outputs, int repeats,
                              Parallel& parallel) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace structadmm::runtime
