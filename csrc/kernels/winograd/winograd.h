// The transforms of a 3x3 convolution of stride 1 by Winograd's algorithm F(4x4, 3x3): the outputs in tiles of 4x4,
// each from 6x6 inputs, by 36 products instead of 144 (Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, CVPR 2016).
//
//   Y = A' [(G g G') . (B' d B)] A        summed over channels before the outer transform
//
// The interpolation points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, whose errors are smaller than those of 0, +-1,
// +-2 (winograd_points.h). What lies between the transforms is 36 products of matrices, which the filters kernels of
// kernels/gemm_compact run: [tiles][channels] by [channels][filters], one for each place of the 6x6 square.
//
// Kernels check nothing. Where a square holds an infinity or NaN, any output of its tile may be one.
#pragma once

#include <cstdint>

#include "base/isa.h"

namespace structadmm::kernels {

inline constexpr int kWinogradTile = 4, kWinogradSquare = 6, kWinogradPlaces = 36;

// Tiles side by side in one row of tiles, of all channels: their squares from x to
//   v[place * place_stride + c * channel_stride + tile]
struct WinogradIn {
  const void* x;           // row 0, column 0 of the image in plane 0: f32, or bf16 as the kernel has it
  const int32_t* channel;  // [channels] planes
  int64_t channels, plane_stride, pitch, height, width;
  int64_t row, column;  // of the first square's corner: negative in the padding
  int tiles;            // 1 to `lanes`
  float* v;
  int64_t place_stride, channel_stride;
};

// Of some tiles, for some filters: sums over channels m[place * place_stride + tile * tile_stride + filter] to
// y[(r * row_stride + tile * 4 + c) * pixel_stride + filter] for the 4 x 4 outputs (r, c) of each tile, bias added.
struct WinogradOut {
  const float* m;
  int64_t place_stride, tile_stride;
  int tiles;
  int filters;        // a whole number of 16
  const float* bias;  // [filters]
  float* y;
  int64_t row_stride, pixel_stride;
};

struct Winograd {
  const char* isa;
  int lanes;
  void (*in)(const WinogradIn&);
  void (*out)(const WinogradOut&);
  void (*in_bf16)(const WinogradIn&) = nullptr;  // null where there is none
};

// A pure function of the instruction set, which need not be this CPU's.
const Winograd& winograd(Isa isa);

}  // namespace structadmm::kernels
