// AMX: a tile product takes 16 filters x 32 taps by 32 taps x 16 pixels. Two tiles of filters by two of pixels
// accumulate, so that four loads feed four products: a load costs half a product.
#include <immintrin.h>

// GCC 12 takes the undefined operands inside its own unmasked intrinsics for variables of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/panel_bf16.h"

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// GCC's intrinsics for tiles do not say that they touch memory; the clobber keeps panels and sums in order with them.
inline void configure() {
  TileConfig c{};
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    c.rows[i] = kTile;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
}

inline void fence() {
  __asm__ volatile("" : : : "memory");
}

// Tiles 0 to 3 become sums of F tiles of filters by V of pixels: 2 f + v; 4 and 5 hold weights, 6 and 7 pixels.
template <int F, int V>
inline void multiply(const Bf16* w, const Bf16* panel, int steps) {
  fence();
  _tile_zero(0);
  if constexpr (V == 2) _tile_zero(1);
  if constexpr (F == 2) _tile_zero(2);
  if constexpr (F == 2 && V == 2) _tile_zero(3);
  for (int s = 0; s < steps; ++s, w += F * kPanelTile, panel += V * kPanelTile) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, panel + kPanelTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (F == 2) {
      _tile_loadd(5, w + kPanelTile, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (F == 2 && V == 2) _tile_dpbf16ps(3, 5, 7);
    fence();
  }
}

template <int F, int V>
inline void store(float* c) {
  constexpr int kRow = 2 * kTile * sizeof(float);
  _tile_stored(0, c, kRow);
  if constexpr (V == 2) _tile_stored(1, c + kTile, kRow);
  if constexpr (F == 2) _tile_stored(2, c + 2 * kTile * kTile, kRow);
  if constexpr (F == 2 && V == 2) _tile_stored(3, c + 2 * kTile * kTile + kTile, kRow);
  fence();
}

void run(const GemmBf16Args& a) {
  configure();
  const Act act = act_of(a.epilogue);
  auto* const sums = reinterpret_cast<float*>(a.scratch);  // two of 32 filters x 32 pixels
  auto* const panel = reinterpret_cast<Bf16*>(a.scratch + 16384);
  // Sums are stored behind the next unit's products: by then they are in the cache, while loads right behind tile
  // stores wait for them.
  Sums waiting{};
  StoreSums store_waiting = nullptr;
  int turn = 0;
  walk(a, [&](const GemmBf16Block& b, Units u, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Place at = place(a, i);
      gather_panel(a, b, at, panel);
      for (int unit = u.first; unit < u.last; ++unit, turn ^= 1) {
        const int filters = b.filters - unit * 2 * kTile;
        const Bf16* w = static_cast<const Bf16*>(b.w) + static_cast<int64_t>(unit) * b.steps * 2 * kPanelTile;
        float* c = sums + turn * 4 * kTile * kTile;
        const auto tiles = [&]<int F, int V>() {
          multiply<F, V>(w, panel, b.steps);
          if (waiting.filters > 0) store_waiting(a, waiting, 0, waiting.filters);
          store<F, V>(c);
        };
        const bool two = at.pair->vectors == 2;
        if (filters > kTile) {
          two ? tiles.template operator()<2, 2>() : tiles.template operator()<2, 1>();
        } else {
          two ? tiles.template operator()<1, 2>() : tiles.template operator()<1, 1>();
        }
        waiting = {c, b.bias + unit * 2 * kTile, b.first_filter + unit * 2 * kTile,
                   filters < 2 * kTile ? filters : 2 * kTile, at};
        store_waiting = store_of(a, act, waiting);
      }
    }
  });
  if (waiting.filters > 0) store_waiting(a, waiting, 0, waiting.filters);
  _tile_release();
}

}  // namespace

extern constinit const GemmBf16 gemm_bf16_amx_bf16 = {"gemm_bf16_32x32__amx_bf16", WeightLayout::kTiles, run};

}  // namespace structadmm::kernels
