// How a convolution on a packed compacted weight runs on planes, f32: what ops/conv_taps_f32.cpp (a step of a segment)
// and ops/conv_compact.cpp (one eager op) have in common.
//
// Outputs are cut into tiles (ops/pixel_tiles.h), and panels of filters are given to the gemm_compact kernels by
// measured cost. Reads stay in [0, x.readable), and y is written at its elements only, or zeros in the halo between its
// rows.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "kernels/gemm_compact/gemm_compact.h"
#include "ops/phases.h"
#include "ops/pixel_tiles.h"
#include "ops/planes.h"
#include "ops/tap_table.h"

namespace structadmm {

// What is copied of x for some panels, in parts: all their taps in order, each once.
struct Collection {
  std::vector<int64_t> offset;    // in x of each tap
  std::vector<uint8_t> position;  // of the kernel, of each tap: where x has edges
  std::vector<int64_t> parts;     // where each part begins, and the end
  // Where the panels do not all read all taps: of each tap that one reads, its place in the part; and per panel, where
  // in `slot` its parts begin, and the end.
  std::vector<uint16_t> slot;
  std::vector<int64_t> begins;

  int64_t count() const { return static_cast<int64_t>(parts.size()) - 1; }
};

struct TapPlan {
  // Some panels of weights under the panel kernel, from a copy of x (of one block, or of all; pixels that fill no
  // vector under the filters kernel, from the same copy), or under the filters kernel (of one block), or one panel
  // under the panel kernel on the planes.
  enum class By { kPlanes, kFilters, kPanel };
  struct Job {
    By by;
    int64_t panel;
    int panels;
    int collection = 0;
    // On the planes, where pixels that fill no vector are a tile by themselves: of how many panels, this one the last,
    // the job multiplies them.
    int rest = 0;
  };

  const kernels::GemmCompact* kernels;
  ConvPlanes planes;  // with `phases`: of the convolution on their copy
  std::optional<Phases> phases;
  Epilogue epilogue;
  std::vector<int64_t> position;     // offset of each kernel position
  std::vector<int64_t> offset;       // in x of all taps of the weight, where no copy is read
  std::vector<int64_t> rest_offset;  // in a copy of one vector, of the taps in a part, or of each Collection::slot
  std::vector<Collection> collections;
  std::vector<Job> jobs;
  PixelTiles direct, panel;  // on the planes; from a copy
  FilterTiles filters;
  double cost = 0;  // estimated cycles of an image

  bool pointwise() const { return position.size() == 1; }  // each tap reads another channel
};

// Whether plan_taps takes an x without halo, of images of this size, and should run faster on it, one of them at a
// time, than on a padded copy: where kernels collect from x anyway, or copy phases of it. Where masks cost something,
// several images are not collected without a copy, as measured: in it those of a channel are neighbours.
bool takes_edges(const Packed& packed, const ConvGeometry& geometry, int64_t batch, int64_t height, int64_t width,
                 Isa isa);

// A pure function of its arguments (isa need not be this CPU's). Throws Error, worded for `op`, where the planes do not
// fit the weight, the geometry or each other. images: the most that a run has. phases: whether x may be copied.
TapPlan plan_taps(const char* op, const Packed& packed, const ConvGeometry& geometry, const Planes& x, const Planes& y,
                  const Planes* residual, const Epilogue& epilogue, int64_t images, Isa isa, bool phases = true);

// x, y, residual: the first elements of what the planes describe; residual null without one.
void run_taps(const TapPlan& plan, const Packed& packed, const float* x, const float* residual, float* y,
              int64_t images, Parallel& parallel);

// Planes of x, or of its phases, that some tap reads.
inline int64_t planes_read(const TapPlan& plan, const Packed& packed) {
  return plan.phases ? plan.phases->count() : static_cast<int64_t>(packed.channels.size());
}

// Pixels in a tile of a job by the filters kernel, at most.
inline int filters_tile(const TapPlan& plan, const Packed& packed, const TapPlan::Job& job) {
  return plan.kernels->pixels[kernels::width_class(packed.panels[job.panel].width)][job.panels - 1];
}

// The kernel of each job.
std::vector<std::string> tap_kernels(const TapPlan& plan, const Packed& packed);

}  // namespace structadmm
