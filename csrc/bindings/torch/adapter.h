// What the op families share at the border to torch: its threads behind the core's parallel interface.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "base/parallel.h"

namespace structadmm::bindings {

using torch::stable::Tensor;

// torch's own threads: torch.set_num_threads is obeyed, and inside a parallel region the caller does the work.
class TorchParallel final : public Parallel {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }

 protected:
  void run_tasks(int64_t n, const void* task, TaskFn fn) override {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(task, i);
    });
  }
};

}  // namespace structadmm::bindings
