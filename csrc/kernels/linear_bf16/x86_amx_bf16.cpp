// AMX: a tile of 16 rows x 32 taps of x, as it lies, by one of 32 taps x 16 filters, which is 16 pairs of a panel.
#include <immintrin.h>

#include <cstring>

#include "kernels/linear_bf16/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

using avx512::Vec;

#include "kernels/linear_bf16/dot_bf16.h"
#include "kernels/linear_bf16/generic.h"

constexpr int kTile = 16, kTaps = 2 * kBlockPairs;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// GCC's intrinsics for tiles do not say that they touch memory.
inline void fence() {
  __asm__ volatile("" : : : "memory");
}

// Tiles 0 to 3 are sums and 4, 5 rows of x: with up to 16 rows, sums of four panels, else of two panels for 16 rows and
// of the same for the rest. Both give four chains of products, as many as hide their latency.
inline void configure(int rows) {
  const bool two = rows > kTile;
  TileConfig c{};
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    const bool second = two && (i == 2 || i == 3 || i == 5);
    c.rows[i] = static_cast<uint8_t>(i >= 6 ? kTile : second ? rows - kTile : two ? kTile : rows);
  }
  if (!two) c.rows[5] = kTile;
  __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
}

template <int V>
void multiply_narrow(const Bf16* x, int64_t x_stride, const Bf16* w, int64_t w_stride) {
  _tile_loadd(4, x, x_stride * 2);
  _tile_loadd(5, w, 64);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (V > 1) {
    _tile_loadd(6, w + w_stride, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (V > 2) {
    _tile_loadd(7, w + 2 * w_stride, 64);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (V > 3) {
    _tile_loadd(5, w + 3 * w_stride, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
}

template <int V>
void multiply_wide(const Bf16* x, int64_t x_stride, const Bf16* w, int64_t w_stride) {
  _tile_loadd(4, x, x_stride * 2);
  _tile_loadd(5, x + kTile * x_stride, x_stride * 2);
  _tile_loadd(6, w, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (V > 1) {
    _tile_loadd(7, w + w_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

using Multiply = void (*)(const Bf16*, int64_t, const Bf16*, int64_t);

// All taps, the last of them from a copy with zeros behind.
template <Multiply multiply>
void multiply_all(const LinearBf16Args& a, const Bf16* w, const Bf16 (*last)[kTaps]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t t = 0;
  for (; t + kTaps <= a.n_taps; t += kTaps) multiply(a.x + t, a.x_stride, w + t * kTile, a.w_stride);
  if (t < a.n_taps) multiply(last[0], kTaps, w + t * kTile, a.w_stride);
}

void finish(const LinearBf16Args& a, int row, int rows, int panel, const float (&sums)[kTile][kTile]) {
  const Vec low = Vec::set1(a.epilogue.low), high = Vec::set1(a.epilogue.high);
  const Vec bias = Vec::load(a.bias + panel * kTile);
  const int64_t left = a.filters - panel * kTile;
  const int n = static_cast<int>(left < kTile ? left : kTile);
  for (int r = 0; r < rows; ++r) {
    Vec v = Vec::load(sums[r]) + bias;
    if (a.residual) v = v + Vec::load_n(a.residual + (row + r) * a.residual_stride + panel * kTile, n);
    v = a.epilogue.activation != Activation::kClamp ? curve(v, a.epilogue) : clamp(v, low, high);
    v.store_n(a.y + (row + r) * a.y_stride + panel * kTile, n);
  }
}

void block(const LinearBf16Args& a) {
  alignas(64) Bf16 last[kBlockRows][kTaps];
  alignas(64) float sums[4][kTile][kTile];
  const int64_t whole = a.n_taps / kTaps * kTaps;
  if (whole < a.n_taps) {
    std::memset(last, 0, sizeof last);
    for (int r = 0; r < a.rows; ++r) {
      std::memcpy(last[r], a.x + r * a.x_stride + whole, static_cast<size_t>(a.n_taps - whole) * sizeof(Bf16));
    }
  }
  configure(a.rows);
  fence();
  if (a.rows <= kTile) {
    constexpr void (*all[])(const LinearBf16Args&, const Bf16*, const Bf16(*)[kTaps]) = {
        multiply_all<multiply_narrow<1>>, multiply_all<multiply_narrow<2>>, multiply_all<multiply_narrow<3>>,
        multiply_all<multiply_narrow<4>>};
    all[a.panels - 1](a, a.w, last);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    fence();
    for (int v = 0; v < a.panels; ++v) finish(a, 0, a.rows, v, sums[v]);
  } else {
    for (int v = 0; v < a.panels; v += 2) {
      const bool pair = v + 1 < a.panels;
      (pair ? multiply_all<multiply_wide<2>> : multiply_all<multiply_wide<1>>)(a, a.w + v * a.w_stride, last);
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      fence();
      for (int i = 0; i < (pair ? 2 : 1); ++i) {
        finish(a, 0, kTile, v + i, sums[i]);
        finish(a, kTile, a.rows - kTile, v + i, sums[2 + i]);
      }
    }
  }
  _tile_release();
}

}  // namespace

extern constinit const LinearBf16 linear_bf16_amx_bf16 = make("amx_bf16", &block);

}  // namespace structadmm::kernels
