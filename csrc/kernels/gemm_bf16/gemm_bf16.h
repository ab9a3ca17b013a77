// Compacted convolution in bf16 with f32 sums: a matrix product over tap tables, gathered and stored by pixel.
//
//   y[f, p] = bf16(activation(bias[f] + residual[f, p] + sum over taps t of the block of f: w[f, t] * x[at(p) +
//   offset[t]]))
//
// Filters stand in *tiles* of 16, two of them a *unit*; output pixels in *vectors* of 16, two of them a *pair*. A task
// is a range of pairs by a range of units. For a pair and a block the kernel gathers a *panel*, the block's taps at 32
// pixels, which all units of the block share. How a vector of pixels lies in x is data, so strides, row ends and small
// maps are no cases of the kernel.
//
// x is bf16 planes, or where pixels lie in rows, the caller's f32, which is rounded on the way and has no halo. y is
// bf16 or f32.
//
// Sums are f32, taps in ascending order within each of a fixed number of chains that the instruction set decides; an
// output depends on nothing but the taps of its block. Tiles and dot products take subnormal bf16 for zero.
//
// x is read in [0, readable) only, as the tables were made; y is written where windows say, nowhere else. residual and
// y may be the same memory in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm::kernels {

inline constexpr int kTile = 16;      // filters or pixels
inline constexpr int kStepTaps = 32;  // of one tile product
inline constexpr int kMostStrip = 32;

// How the 16 inputs of a tap come into a register: the bytes that are loaded at each piece's offset.
enum class Gather : int32_t {
  kRow,         // 16 neighbours
  kWindow,      // from one window of 32 elements
  kHalves,      // from two of 16
  kQuarters,    // from four of 8
  kTwoWindows,  // from two of 32
  kLanes,       // one by one
};

struct PanelVector {
  // [2 i], [2 i + 1]: where pixel i stands in 32 loaded elements of one tap, and, 32 higher, of the next. With
  // kTwoWindows both are its place in the 64 elements that are loaded of each tap. Lanes without a pixel repeat the
  // first.
  alignas(64) int16_t index[32];
  int32_t lane[kTile];  // offsets of the pixels in x
  int32_t piece[4];     // offsets of what is loaded
  Gather gather;
};

// Pixels of one image that lie in 32 consecutive elements of a plane.
struct PlaneWindow {
  alignas(64) int16_t to[32];  // element j gets lane to[j] of the pair
  int16_t from[32];            // lane i is element from[i]
  uint32_t elements, filled;   // bits of those that are written; of those that a pixel fills, others get zero: a halo
  uint32_t pixels;             // lanes
  int64_t offset;              // of element 0
  int32_t image;               // windows of images that are not there are left out
};

// How the 32 pixels of a pair lie in x.
enum class Read : int32_t {
  kVectors,  // each vector as its table says
  kRow,      // one behind the other from the first vector's piece[0]. The pixels of two vectors stand in row_order.
  kEdges,    // likewise, of the caller's f32: those beyond the image's edge, where `inside` has no bit, are zeros
  kEnds,     // likewise, at an end of the caller's memory: none but the pixels inside may be read
};

// Pixel i of a row of 32 stands in this lane: the even groups of four in the first vector, the odd ones in the second.
constexpr int row_order(int i) {
  return i / 4 % 2 * kTile + i / 8 * 4 + i % 4;
}

struct PanelPair {
  int32_t first_vector, vectors;  // 1 or 2
  int32_t first_window, windows;  // of y
  int32_t first_residual, residuals;
  Read read;
};

struct GemmBf16Block {
  int64_t first_filter;
  int32_t filters, taps, steps;  // steps: of kStepTaps
  int32_t first_unit;            // counted over all blocks
  const int32_t* offset;         // [steps * kStepTaps], the last tap's repeated behind it
  const int32_t* position;       // likewise: the taps' positions in the kernel
  const void* w;                 // as WeightLayout has it
  const float* bias;             // [filters, rounded up to units]
};

enum class WeightLayout {
  kTiles,  // bf16 [unit][step][tile of the unit][16 filters][32 taps]; a last unit of one tile has one tile
  kRows,   // f32 [tile][steps * 32 taps][16 filters]
};

struct GemmBf16Args {
  const void* x;
  void* y;
  bool x_f32, y_f32;
  const Bf16* residual;  // null: none
  int64_t y_channel_stride, residual_channel_stride;
  // The tables describe `period` images; image n * period + i lies n strides behind image i.
  int64_t x_period_stride, y_period_stride, residual_period_stride;
  int64_t pairs_per_period;
  int32_t period, images;
  const PanelPair* pairs;
  const PanelVector* vectors;
  const uint32_t*
      inside;  // [pair][positions]: bits of the 32 pixels, in their order in x, that a tap finds in the image
  int32_t positions;
  const PlaneWindow *windows, *residual_windows;
  const GemmBf16Block* blocks;
  int64_t n_blocks;
  int64_t first_pair, last_pair;  // counted over all periods
  int32_t first_unit, last_unit;
  int32_t strip;  // pairs that every block is done for before the next strip, at most kMostStrip
  Epilogue epilogue;
  std::byte* scratch;  // [gemm_bf16_scratch(most steps of a block, strip)], aligned to 64
};

constexpr int64_t gemm_bf16_scratch(int64_t steps, int64_t strip) {
  return 16384 + strip * steps * 4096;
}

// The kernels with WeightLayout::kTiles read rows of pixels as Read says, and f32; the others by vectors alone.
struct GemmBf16 {
  const char* name;
  WeightLayout layout;
  void (*run)(const GemmBf16Args& a);
  // Elements of a weight, with more of which it does not stay in L2: strips of several pairs then pay. 0: not measured.
  int64_t near_weights = 0;
};

// A pure function of the instruction set, which need not be this CPU's.
const GemmBf16& gemm_bf16(Isa isa);

extern const GemmBf16 gemm_bf16_scalar;
#if SADMM_X86
extern const GemmBf16 gemm_bf16_avx2, gemm_bf16_avx512, gemm_bf16_avx512_bf16, gemm_bf16_amx_bf16;
#endif

}  // namespace structadmm::kernels
