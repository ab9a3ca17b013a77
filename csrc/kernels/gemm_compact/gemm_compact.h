// Micro-kernels of the compacted convolution and linear layer (f32).
//
//   y[f, p] = bias[f] + sum over taps t of w[t, f] * x[t, p]
//
// A *panel* is 16, 8 or 4 consecutive filters that share one list of taps; its weights are stored [tap][panel width],
// zeros behind the last filter. A tap is a pair (channel, kernel position) and reads x at channel * channel_stride +
// position_offset[position], so a tap list does not depend on the size of the map. Every output is one chain of
// multiply-adds over the taps in order, begun with the bias: it depends neither on the tile nor on the thread.
//
//   pixels   registers hold MR filters x NR vectors of pixels, weights are broadcast: for narrow panels
//   filters  registers hold P pixels x NV panels (vectors of filters), pixels are broadcast: needs no halo, no stride
//   and no
//            width of the map to fill its vectors, only enough filters that share their taps
//
// Pointers need no alignment. x may be read up to 2 * lanes - 1 floats past a vector's offset, y is written only where
// outputs are; x and y do not overlap. Kernels check nothing.
#pragma once

#include <cstdint>

#include "base/isa.h"
#include "kernels/gemm_compact/packed.h"

namespace structadmm::kernels {

inline constexpr int kMaxPanel = 16;   // filters
inline constexpr int kMaxLanes = 16;   // of any instruction set
inline constexpr int kMaxPixels = 8;   // P of any instruction set
inline constexpr int kMaxVectors = 6;  // NR of any instruction set
inline constexpr int kMaxPanels = 3;   // NV of any instruction set

// Lanes of a vector of pixels that lie in one image: in order, they go to consecutive places of y.
struct PixelSegment {
  int64_t y_offset;  // of the first of them
  uint32_t lanes;    // bit i: lane i belongs here
  int32_t image;     // segments of images that are not there (image >= PixelsArgs::images) are not written
};

// A vector of pixels: lane i reads x at offset + lane[i], 0 <= lane[i] < 2 * lanes; kernels without Gather read offset
// + i.
struct PixelVector {
  int64_t offset;
  int32_t first_segment, segments;
  alignas(64) int32_t lane[kMaxLanes];
};

struct PixelsArgs {
  const float* x;
  int64_t channel_stride;
  const int64_t* position_offset;
  const Tap* taps;
  int64_t n_taps;
  const float* w;    // [n_taps][w_stride], the first MR of each row are used
  int64_t w_stride;  // panel width
  const float* bias;
  float* y;
  int64_t y_stride;            // from filter to filter
  int filters;                 // 1 to MR: those that exist
  const PixelVector* vectors;  // [NR]
  const PixelSegment* segments;
  int images;
};

struct FiltersArgs {
  const float* x;
  int64_t channel_stride;
  const int64_t* position_offset;
  const Tap* taps;
  int64_t n_taps;
  const float* w;  // [NV][n_taps][panel width]
  const float* bias;
  float* y;
  int64_t y_stride;      // from filter to filter
  int filters;           // 1 to NV * width: those that exist
  const int32_t* pixel;  // [P] offsets in x
  const int32_t* out;    // [P] offsets in y
};

using PixelsKernel = void (*)(const PixelsArgs&);
using FiltersKernel = void (*)(const FiltersArgs&);

// The kernels of one instruction set, null where there is none, by width class (0, 1, 2 for panels 16, 8, 4 wide).
struct GemmCompact {
  const char* isa;
  int lanes;    // pixels in a vector
  int pixels;   // largest P
  int mr[3];    // filters in a pixels kernel: a panel takes width / mr of them
  int nr[3];    // largest NR
  int nv[3];    // largest NV
  bool gather;  // whether there are pixels kernels with Gather
  // Measured cycles per tap of a full tile, by which the kernel for a shape is chosen: [width class][NR - 1], [NV - 1].
  double pixels_cycles[3][kMaxVectors];
  double filters_cycles[3][kMaxPanels];
  PixelsKernel pixels_kernel[2][3][kMaxVectors];            // [gather][width class][NR - 1]
  FiltersKernel filters_kernel[3][kMaxPanels][kMaxPixels];  // [width class][NV - 1][P - 1]
};

// 0, 1, 2 for panels 16, 8, 4 wide.
constexpr int width_class(int width) {
  return width == 16 ? 0 : width == 8 ? 1 : 2;
}

// A pure function of the instruction set, which need not be this CPU's.
const GemmCompact& gemm_compact(Isa isa);

}  // namespace structadmm::kernels
