// How a convolution on a packed compacted weight runs on planes, f32: what ops/conv_taps_f32.cpp (a step of a segment)
// and ops/conv_compact.cpp (one eager op) have in common.
//
// Outputs are cut into tiles (ops/pixel_tiles.h), and panels of filters are given to the gemm_compact kernels by
// measured cost. Reads stay in [0, x.readable), and y is written at its elements only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "kernels/gemm_compact/gemm_compact.h"
#include "ops/pixel_tiles.h"
#include "ops/planes.h"
#include "ops/tap_table.h"

namespace structadmm {

struct TapPlan {
  // Some panels of weights that share their taps, under the filters or the panel kernel, or one under the pixels
  // kernel.
  enum class By { kPixels, kFilters, kPanel };
  struct Job {
    By by;
    int64_t panel;
    int panels;
  };

  const kernels::GemmCompact* kernels;
  ConvPlanes planes;
  Epilogue epilogue;
  std::vector<int64_t> position;  // offset of each kernel position
  std::vector<Job> jobs;
  PixelTiles pixels, panel;
  FilterTiles filters;
};

// A pure function of its arguments (isa need not be this CPU's). Throws Error, worded for `op`, where the planes do not
// fit the weight, the geometry or each other. images: the most that a run has.
TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& geometry, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa);

// x, y, residual: the first elements of what the planes describe; residual null without one.
void run_taps(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
              int64_t images, Parallel& parallel);

// Pixels in a tile of a job by the filters kernel, at most.
inline int filters_tile(const TapPlan& plan, const Packed& packed, const TapPlan::Job& job) {
  return plan.kernels->pixels[kernels::width_class(packed.panels[job.panel].width)][job.panels - 1];
}

// The kernel of each job.
std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed);

}  // namespace structadmm
