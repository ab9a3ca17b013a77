// The kernel for CPUs without bf16 products, over ActiveVec: bf16 is widened into an f32 panel [tap][32 pixels],
// kFilters filters by 32 pixels accumulate. Included inside an ISA file's anonymous namespace.

#include "kernels/gemm_bf16/walk.h"

using Vec = ActiveVec;
inline constexpr int kPairPixels = 2 * kTile, kVectors = kPairPixels / Vec::kWidth;

inline void gather_panel(const GemmBf16Args& a, const GemmBf16Block& b, const Place& at, float* panel) {
  for (int k = 0; k < at.pair->vectors; ++k) {
    const PanelVector& v = a.vectors[at.pair->first_vector + k];
    float* to = panel + k * kTile;
    for (int t = 0; t < b.taps; ++t, to += kPairPixels) {
      const Bf16* from = static_cast<const Bf16*>(at.x) + b.offset[t];
      if (v.gather == Gather::kRow) {
        for (int i = 0; i < kTile; i += Vec::kWidth) Vec::load(from + v.lane[0] + i).store(to + i);
      } else {
        for (int i = 0; i < kTile; ++i) {
          const uint32_t bits = static_cast<uint32_t>(from[v.lane[i]].bits) << 16;
          __builtin_memcpy(to + i, &bits, sizeof bits);
        }
      }
    }
  }
}

template <int kFilters>
void multiply(const float* w, const float* panel, int taps, float* c) {
  Vec sum[kFilters][kVectors];
#pragma GCC unroll 8
  for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[f][v] = Vec::zero();
  }
  for (int t = 0; t < taps; ++t, w += kTile, panel += kPairPixels) {
    Vec x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = Vec::load(panel + v * Vec::kWidth);
#pragma GCC unroll 8
    for (int f = 0; f < kFilters; ++f) {
      const Vec wf = Vec::set1(w[f]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[f][v] = mul_add(wf, x[v], sum[f][v]);
    }
  }
#pragma GCC unroll 8
  for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[f][v].store(c + f * kPairPixels + v * Vec::kWidth);
  }
}

[[gnu::noinline]] Vec finished(Vec x, const Epilogue& e) {
  return activate(x, e);
}

// One filter's 32 sums.
void store_sums(const GemmBf16Args& a, const Place& at, int64_t filter, float bias, float* c) {
  if (a.residual) {
    const Bf16* residual = at.residual + filter * a.residual_channel_stride;
    const PlaneWindow* w = a.residual_windows + at.pair->first_residual;
    for (int i = 0; i < at.pair->residuals && w->image < at.images; ++i, ++w) {
      for (uint32_t left = w->pixels; left; left &= left - 1) {
        const int p = __builtin_ctz(left);
        const uint32_t bits = static_cast<uint32_t>(residual[w->offset + w->from[p]].bits) << 16;
        float r;
        __builtin_memcpy(&r, &bits, sizeof r);
        c[p] = c[p] + bias + r;
      }
    }
    bias = 0;
  }
  const Vec b = Vec::set1(bias);
  const auto store = [&]<class Out>(Out* y) {
    Out out[kPairPixels];
    for (int i = 0; i < kPairPixels; i += Vec::kWidth) finished(Vec::load(c + i) + b, a.epilogue).store(out + i);
    y += filter * a.y_channel_stride;
    const PlaneWindow* w = a.windows + at.pair->first_window;
    for (int i = 0; i < at.pair->windows && w->image < at.images; ++i, ++w) {
      for (uint32_t left = w->elements; left; left &= left - 1) {
        const int e = __builtin_ctz(left);
        y[w->offset + e] = w->filled >> e & 1 ? out[w->to[e]] : Out{0};
      }
    }
  };
  a.y_f32 ? store(static_cast<float*>(at.y)) : store(static_cast<Bf16*>(at.y));
}

template <int kFilters>
void run(const GemmBf16Args& a) {
  auto* const sums = reinterpret_cast<float*>(a.scratch);
  auto* const panel = reinterpret_cast<float*>(a.scratch + 16384);
  for (Walk walk(a); !walk.done(); walk.next()) {
    const GemmBf16Block& b = walk.block();
    const Units u = walk.units();
    const int end = b.filters < u.last * 2 * kTile ? b.filters : u.last * 2 * kTile;
    for (int i = 0; i < walk.pairs(); ++i) {
      const Place at = place(a, walk.first_pair() + i);
      gather_panel(a, b, at, panel);
      for (int f = u.first * 2 * kTile; f < end; f += kFilters) {
        const float* w = static_cast<const float*>(b.w) + static_cast<int64_t>(f / kTile) * b.steps * kStepTaps * kTile;
        multiply<kFilters>(w + f % kTile, panel, b.taps, sums);
        for (int k = 0; k < kFilters && f + k < end; ++k) {
          store_sums(a, at, b.first_filter + f + k, b.bias[f + k], sums + k * kPairPixels);
        }
      }
    }
  }
}
