// Tables of how output pixels lie in x and y, for the kernels of gemm_bf16: strides, row ends, small maps and the
// caller's own tensors are data to them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/gemm_bf16/gemm_bf16.h"
#include "ops/conv.h"
#include "ops/planes.h"

namespace structadmm {

struct PanelTables {
  int64_t period = 1;  // images
  std::vector<kernels::PanelPair> pairs;
  std::vector<int32_t> first_image;  // of each pair
  std::vector<kernels::PanelVector> vectors;
  std::vector<kernels::PlaneWindow> windows, residual_windows;
  std::vector<uint32_t> inside;  // [pair][position], where x is the caller's f32
};

// What tables are made for.
struct PanelPlanes {
  const Planes &x, &y;
  const Planes* residual;
  int64_t images;
  int64_t nearest, furthest;  // offsets of taps
  bool rows;                  // whether the kernel reads rows of 32 pixels

  // Elements that a tap at offset 0 may load from the first images on.
  int64_t readable(int64_t period) const { return x.readable - furthest - (images - period) * x.image_stride; }
};

// x of bf16 has the halo that the convolution reads; x of f32 is the caller's, of a convolution that keeps its size.
PanelTables make_panel_tables(const ConvSpec& s, const PanelPlanes& l);

}  // namespace structadmm
