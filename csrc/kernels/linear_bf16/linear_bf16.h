// Micro-kernel of a linear layer with weights and activations in bf16, sums in f32.
//
//   y[p, f] = act(bias[f] + sum over taps t of w[t, f] * x[p, channel(t)] + residual[p, f])
//
// A *panel* is `lanes` consecutive filters that share their taps; its weights are stored by pairs of taps,
// [pair][lane][2], zeros behind the last filter and the last tap. A tile is P rows of x by V panels of one block, V *
// lanes filters. A sum runs over the taps in order, so it does not depend on the tile; vdpbf16ps (x86_avx512bf16) adds
// a pair at a time and takes subnormals for zeros. y and residual are written and read only where filters are,
// and may be the same memory.
//
// Where taps are all of x's channels, x86_amx_bf16 has a kernel `block` for any number of rows and panels up to its
// own, for which the pairs of a panel are a multiple of kBlockPairs. It adds odd and even taps of 32 apart, whatever
// the rows.
#pragma once

#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm::kernels {

inline constexpr int kLinearPanels = 3;  // largest V
inline constexpr int kLinearTiles = 4;   // P = 1, 2, 4, 8
inline constexpr int kBlockPairs = 16, kBlockPanels = 4, kBlockRows = 32;

struct LinearBf16Args {
  const Bf16* x;
  int64_t x_stride;
  const int32_t* taps;  // channels; null where tap t is channel t of x
  int64_t n_taps;
  const Bf16* w;
  int64_t w_stride;      // from panel to panel
  const float* bias;     // as long as the panels
  const Bf16* residual;  // may be null
  int64_t residual_stride;
  Bf16* y;
  int64_t y_stride;
  int64_t filters;
  int rows, panels;  // of block
  Epilogue epilogue;
};

using LinearBf16Kernel = void (*)(const LinearBf16Args&);

struct LinearBf16 {
  const char* isa;
  int lanes, tiles;                                      // how many of the kernels of kernel[][] there are
  LinearBf16Kernel kernel[kLinearPanels][kLinearTiles];  // [V - 1][log2 P]
  LinearBf16Kernel block;                                // or null
};

const LinearBf16& linear_bf16(Isa isa);

}  // namespace structadmm::kernels
