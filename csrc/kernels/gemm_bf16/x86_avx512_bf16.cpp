// AVX512-BF16: 8 filters x 2 vectors of 16 pixels accumulate, or 16 x 1; a weight pair is broadcast from its tile.
#include <immintrin.h>

// GCC 12 takes the undefined operands inside its own unmasked intrinsics for variables of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/panel_bf16.h"

// Filters at a time: sixteen sums, for eight would wait for themselves.
constexpr int filters_of(int vectors) {
  return vectors == 2 ? 8 : 16;
}

// Elements of a block: with more they do not stay in L2; with fewer all is there soon enough.
constexpr int64_t kNearWeights = 1 << 18, kFewWeights = 1 << 16;

// w: the tile that holds the filters, at the first of them; stride: to the tile of the next step. rows: of the panel,
// of which the last step may have fewer than 16. kNext: a line per filter from `next` on is fetched with each step, all
// of the next unit in the calls of one. (A call reads eight or sixteen lines of every 32, a pattern that the processor
// does not follow by itself, and small maps waited for their weights.)
template <int V, bool kNext>
void multiply(const Bf16* w, int64_t stride, const Bf16* next, const Bf16* panel, int rows, float* c) {
  constexpr int kFilters = filters_of(V);
  __m512 sum[kFilters][V];
#pragma GCC unroll 16
  for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[f][v] = _mm512_setzero_ps();
  }
  for (; rows > 0; rows -= kTile, w += stride, panel += V * kPanelTile) {
    const int some = rows < kTile ? rows : kTile;
    if constexpr (kNext) {
#pragma GCC unroll 16
      for (int f = 0; f < kFilters; ++f, next += kStepTaps) __builtin_prefetch(next, 0, 2);
    }
    for (int r = 0; r < some; ++r) {
      __m512bh x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        x[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + (r * V + v) * kPanelRow));
      }
#pragma GCC unroll 16
      for (int f = 0; f < kFilters; ++f) {
        int32_t taps;
        __builtin_memcpy(&taps, w + f * kStepTaps + 2 * r, sizeof taps);
        const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(taps));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[f][v] = _mm512_dpbf16_ps(sum[f][v], both, x[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_store_ps(c + f * 2 * kTile + v * kTile, sum[f][v]);
  }
}

// All of a panel, while the weights of the first unit are fetched, a step of them at a time.
void gather_fetching(PanelRows& panel, int rows, const Bf16* w, int step) {
  for (; rows > 0; rows -= kTile, w += step) {
    panel.gather(rows < kTile ? rows : kTile);
    for (int i = 0; i < step; i += kStepTaps) __builtin_prefetch(w + i, 0, 2);
  }
}

void run(const GemmBf16Args& a) {
  const Act act = act_of(a.epilogue);
  auto* const sums = reinterpret_cast<float*>(a.scratch);
  auto* const panels = reinterpret_cast<Bf16*>(a.scratch + 16384);
  Place at[kMostStrip];
  for (Walk walk(a); !walk.done(); walk.next()) {
    const GemmBf16Block& b = walk.block();
    const Units u = walk.units();
    const int rows = (b.taps + 1) / 2;
    const int64_t unit_size = int64_t{b.steps} * 2 * kPanelTile;
    const int64_t size = unit_size * (u.last - u.first);
    const bool cold = walk.first_pair() == a.first_pair || size > kNearWeights;
    for (int i = 0; i < walk.pairs(); ++i) {
      at[i] = place(a, walk.first_pair() + i);
      PanelRows panel(a, b, at[i], panels + i * unit_size);
      if (i == 0 && cold && size > kFewWeights) {
        const bool one = b.filters - u.first * 2 * kTile <= kTile;
        gather_fetching(panel, rows, static_cast<const Bf16*>(b.w) + u.first * unit_size, (one ? 1 : 2) * kPanelTile);
      } else {
        panel.gather(rows);
      }
    }
    for (int unit = u.first; unit < u.last; ++unit) {
      const int left = b.filters - unit * 2 * kTile, filters = left < 2 * kTile ? left : 2 * kTile;
      const int tiles = filters > kTile ? 2 : 1;
      const Bf16* const w = static_cast<const Bf16*>(b.w) + unit * unit_size;
      for (int i = 0; i < walk.pairs(); ++i) {
        const Bf16* const panel = panels + i * unit_size;
        const bool fetch = i == 0 && cold && unit + 1 < u.last;
        const auto product = at[i].pair->vectors == 2 ? (fetch ? multiply<2, true> : multiply<2, false>)
                                                      : (fetch ? multiply<1, true> : multiply<1, false>);
        for (int f = 0; f < filters; f += filters_of(at[i].pair->vectors)) {
          const Bf16* first_w = w + f / kTile * kPanelTile + f % kTile * kStepTaps;
          const Bf16* const next = w + unit_size + f * b.steps * kStepTaps;
          product(first_w, tiles * kPanelTile, next, panel, rows, sums + f * 2 * kTile);
        }
        const Sums done{sums, b.bias + unit * 2 * kTile, b.first_filter + unit * 2 * kTile, filters, at[i]};
        store_of(a, act, done)(a, done, 0, filters);
      }
    }
  }
}

}  // namespace

extern constinit const GemmBf16 gemm_bf16_avx512_bf16 = {"gemm_bf16_8x32__avx512_bf16", WeightLayout::kTiles, run,
                                                         kNearWeights};

}  // namespace structadmm::kernels
