// A convolution with stride is one without on the *phases* of x: every stride-th row and column of the padded x, from
// some row and column on. A copy has those planes of them that some tap reads, each with all images one below the
// other.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "base/isa.h"
#include "base/parallel.h"
#include "kernels/pad_copy/pad_copy.h"
#include "ops/pixel_tiles.h"
#include "ops/tap_table.h"

namespace structadmm {

// Which planes a copy has.
struct Phases {
  struct Plane {
    int64_t from;   // in x, where the first row that is copied begins
    int32_t shape;  // in `shapes`
  };
  kernels::PadCopyKernel copy;
  std::vector<kernels::PadCopyArgs> shapes;  // of a plane, without src, dst and images
  std::vector<Plane> planes;
  int64_t images = 1;        // in a copy, at most
  int64_t image_stride = 0;  // of x
  int64_t plane_stride = 0;  // of the copy

  int64_t count() const { return static_cast<int64_t>(planes.size()); }
};

// The convolution on a copy, while it is planned.
struct OnPhases {
  struct Place {
    int64_t phase;  // that a kernel position reads
    int64_t at;     // in a plane of it, for the first output
  };
  Phases phases;
  ConvPlanes planes;
  std::vector<Place> places;                      // of the kernel's positions
  std::vector<std::pair<int64_t, int64_t>> read;  // channel and phase of each plane, ascending
  double cost = 0;                                // estimated cycles of copying an image

  int64_t plane_of(const kernels::Tap& tap) const;
  // Where in the copy a tap reads for the first output.
  int64_t offset_of(const kernels::Tap& tap) const {
    return plane_of(tap) * planes.x.channel_stride + places[tap.position].at;
  }
};

// Estimated cycles of copying a row whose columns have a stride.
double row_copy_cost(int64_t stride, int64_t columns, int lanes);

// planes: of the convolution with its stride, which has taps. images: the most that a run has. None where a plane of
// the copy is so large that offsets in it don't fit the kernels' tables. A pure function.
std::optional<OnPhases> phases_of(const Packed& packed, const ConvPlanes& planes, int64_t images, int lanes, Isa isa);

// x: its first image; to: as OnPhases::planes describes. images: at most Phases::images. In so many tasks.
void copy_phases(const Phases& phases, const float* x, int64_t images, float* to, int64_t tasks, Parallel& parallel);

}  // namespace structadmm
