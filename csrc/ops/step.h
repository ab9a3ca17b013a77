// One step of a segment: all is decided but the data.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/parallel.h"

namespace structadmm {

class Step {
 public:
  virtual ~Step() = default;

  // Reads `inputs` (as many as the step has, in order), writes `output`; pointers are to the first element of the
  // memory that the planes given at planning describe (not to the origin). images: how many are there, at most those
  // planned for. Allocates nothing after the first call of a thread, throws nothing, and gives the same bits for any
  // number of threads, and for an image whatever the images around it.
  virtual void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const = 0;

  // What runs, for reports and tests: names of kernels, joined by "+" where there are several.
  virtual std::string kernel() const = 0;
};

}  // namespace structadmm
