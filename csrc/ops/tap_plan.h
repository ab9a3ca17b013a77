// How a convolution on a packed compacted weight runs on planes, f32: what ops/conv_taps_f32.cpp (a step of a segment)
// and ops/conv_compact.cpp (one eager op) have in common.
//
// Outputs are cut into tiles, and each panel of filters is given to one of the two gemm_compact kernels by measured
// cost. Reads stay in [0, x.readable), and y is written at its elements only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "kernels/gemm_compact/gemm_compact.h"
#include "ops/planes.h"
#include "ops/tap_table.h"

namespace structadmm {

struct ConvGeometry {
  int64_t stride[2], padding[2], dilation[2];
  bool operator==(const ConvGeometry&) const = default;
};

struct TapPlan {
  // A panel under the pixels kernel (panels = 0; mr filters from its `first`), or some panels under the filters kernel.
  struct Job {
    int64_t panel;
    int panels, first;
  };
  struct Tile {
    int64_t first;
    int count;
  };
  // How the outputs of `period` images are cut into vectors of pixels, and those into tiles.
  struct PixelTiles {
    bool gather = false;
    int64_t period = 1;
    std::vector<kernels::PixelVector> vectors;
    std::vector<kernels::PixelStore> stores;
    std::vector<Tile> tiles[3];  // per width class
  };
  // The outputs of `period` images one by one.
  struct FilterTiles {
    int64_t period = 1, spans = 0;
    std::vector<int32_t> pixel;
    std::vector<kernels::PixelStore> stores;
    std::vector<kernels::StoreRange> vectors;
  };

  const kernels::GemmCompact* kernels;
  Planes x, y, residual;  // residual: as y without one
  Epilogue epilogue;
  int64_t outputs;                // of an image
  std::vector<int64_t> position;  // offset of each kernel position
  std::vector<Job> jobs;
  PixelTiles pixels;
  FilterTiles filters;
};

// A pure function of its arguments (isa need not be this CPU's). Throws Error, worded for `op`, where the planes do not
// fit the weight, the geometry or each other. images: the most that a run has.
TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& geometry, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa);

// x, y, residual: the first elements of what the planes describe; residual null without one.
void run_taps(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
              int64_t images, Parallel& parallel);

// The kernel of each job.
std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed);

}  // namespace structadmm
