// What the two instruction sets with bf16 products share: panels and epilogues in AVX-512. Included inside their
// anonymous namespaces.
//
// A panel is bf16 [step][vector][16 pairs of taps][16 pixels][2 taps], 1 KiB per step and vector.

#include "kernels/gemm_bf16/walk.h"

inline constexpr int kPanelTile = kTile * kTile * 2;

template <Gather kGather>
inline __m512i load_pixels(const Bf16* x, const PanelVector& v, int64_t offset) {
  const auto half = [&](int i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + v.piece[i] + offset));
  };
  const auto quarter = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + v.piece[i] + offset));
  };
  if constexpr (kGather == Gather::kWindow) {
    return _mm512_loadu_si512(x + v.piece[0] + offset);
  } else if constexpr (kGather == Gather::kHalves) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
  } else {
    __m512i r = _mm512_castsi128_si512(quarter(0));
    r = _mm512_inserti32x4(r, quarter(1), 1);
    r = _mm512_inserti32x4(r, quarter(2), 2);
    return _mm512_inserti32x4(r, quarter(3), 3);
  }
}

// 16 pairs of taps of one vector. taps: those that are left, of which the last step may have fewer than 32; the rest of
// its rows are zeros, whatever x holds.
template <Gather kGather, bool kLast>
inline void gather_tile(const Bf16* x, const PanelVector& v, const int32_t* offset, int taps, Bf16* panel) {
  const __m512i index = _mm512_load_si512(v.index);
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
    const int64_t first = offset[2 * r], second = offset[2 * r + 1];
    __m512i row;
    if constexpr (kGather == Gather::kRow) {
      const Bf16* p = x + v.piece[0];
      row = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + first)));
      row = _mm512_inserti64x4(row, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + second)), 1);
      row = _mm512_permutexvar_epi16(index, row);
    } else {
      row = _mm512_permutex2var_epi16(load_pixels<kGather>(x, v, first), index, load_pixels<kGather>(x, v, second));
    }
    if constexpr (kLast) {
      const __mmask32 there = 2 * r + 1 < taps ? 0xFFFFFFFF : 2 * r < taps ? 0x55555555 : 0;
      row = _mm512_maskz_mov_epi16(there, row);
    }
    _mm512_store_si512(panel + r * 32, row);
  }
}

inline void gather_lanes(const Bf16* x, const PanelVector& v, const int32_t* offset, int taps, Bf16* panel) {
  for (int t = 0; t < kStepTaps; ++t) {
    Bf16* row = panel + t / 2 * 32 + t % 2;
    const Bf16* from = x + offset[t];
    for (int i = 0; i < kTile; ++i) row[2 * i] = t < taps ? from[v.lane[i]] : Bf16{0};
  }
}

template <bool kLast>
inline void gather_tile(const Bf16* x, const PanelVector& v, const int32_t* offset, int taps, Bf16* panel) {
  switch (v.gather) {
    case Gather::kRow:
      return gather_tile<Gather::kRow, kLast>(x, v, offset, taps, panel);
    case Gather::kWindow:
      return gather_tile<Gather::kWindow, kLast>(x, v, offset, taps, panel);
    case Gather::kHalves:
      return gather_tile<Gather::kHalves, kLast>(x, v, offset, taps, panel);
    case Gather::kQuarters:
      return gather_tile<Gather::kQuarters, kLast>(x, v, offset, taps, panel);
    case Gather::kLanes:
      return gather_lanes(x, v, offset, taps, panel);
  }
}

// The `i`-th of steps * vectors tiles of a panel.
inline void gather_panel_tile(const GemmBf16Args& a, const GemmBf16Block& b, const Place& at, int i, Bf16* panel) {
  const int vectors = at.pair->vectors, step = i / vectors;
  const PanelVector& v = a.vectors[at.pair->first_vector + i % vectors];
  const int32_t* offset = b.offset + step * kStepTaps;
  const int taps = b.taps - step * kStepTaps;
  if (taps >= kStepTaps) {
    gather_tile<false>(at.x, v, offset, taps, panel + i * kPanelTile);
  } else {
    gather_tile<true>(at.x, v, offset, taps, panel + i * kPanelTile);
  }
}

inline void gather_panel(const GemmBf16Args& a, const GemmBf16Block& b, const Place& at, Bf16* panel) {
  for (int i = 0; i < b.steps * at.pair->vectors; ++i) gather_panel_tile(a, b, at, i, panel);
}

enum class Act { kNone, kRelu, kClamp, kCurve };

inline Act act_of(const Epilogue& e) {
  constexpr float kInf = __builtin_huge_valf();
  if (e.activation != Activation::kClamp) return Act::kCurve;
  if (e.high != kInf) return Act::kClamp;
  return e.low == -kInf ? Act::kNone : Act::kRelu;
}

[[gnu::noinline]] __m512 curve(__m512 x, const Epilogue& e) {
  return activate(ActiveVec{x}, e).v;
}

// Sums of up to 32 filters by 32 pixels, [filter][pixel] f32.
struct Sums {
  const float* c;
  const float* bias;
  int64_t first_filter;
  int filters;
  Place at;
};

template <Act kAct, bool kResidual, bool kWhole>
void store_sums(const GemmBf16Args& a, const Sums& s, int first, int last) {
  const PlaneWindow* const windows = a.windows + s.at.pair->first_window;
  const PlaneWindow* const residuals = kResidual ? a.residual_windows + s.at.pair->first_residual : nullptr;
  const __m512 low = _mm512_set1_ps(a.epilogue.low), high = _mm512_set1_ps(a.epilogue.high);
  const bool whole_residual = kResidual && residuals->elements == 0xFFFFFFFF;
  Bf16* y = s.at.y + (s.first_filter + first) * a.y_channel_stride;
  const Bf16* residual = kResidual ? s.at.residual + (s.first_filter + first) * a.residual_channel_stride : nullptr;
  const float* c = s.c + first * 2 * kTile;
  for (int f = first; f < last; ++f, c += 2 * kTile, y += a.y_channel_stride) {
    const __m512 bias = _mm512_set1_ps(s.bias[f]);
    __m512 v[2] = {_mm512_add_ps(_mm512_load_ps(c), bias), _mm512_add_ps(_mm512_load_ps(c + kTile), bias)};
    if constexpr (kResidual) {
      __m512i r;
      if (whole_residual) {
        r = _mm512_loadu_si512(residual + residuals->offset);
      } else {
        r = _mm512_setzero_si512();
        for (int w = 0; w < s.at.pair->residuals; ++w) {
          const PlaneWindow& from = residuals[w];
          if (from.image >= s.at.images) break;
          r = _mm512_mask_permutexvar_epi16(r, from.pixels, _mm512_loadu_si512(from.from),
                                            _mm512_maskz_loadu_epi16(from.elements, residual + from.offset));
        }
      }
      residual += a.residual_channel_stride;
      v[0] = _mm512_add_ps(
          v[0], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(r)), 16)));
      v[1] = _mm512_add_ps(
          v[1], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(r, 1)), 16)));
    }
    // The second operand is returned where one is NaN.
    if constexpr (kAct == Act::kRelu || kAct == Act::kClamp) {
      v[0] = _mm512_max_ps(low, v[0]);
      v[1] = _mm512_max_ps(low, v[1]);
    }
    if constexpr (kAct == Act::kClamp) {
      v[0] = _mm512_min_ps(high, v[0]);
      v[1] = _mm512_min_ps(high, v[1]);
    }
    if constexpr (kAct == Act::kCurve) {
      v[0] = curve(v[0], a.epilogue);
      v[1] = curve(v[1], a.epilogue);
    }
    const __m512i out = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0]));
    if constexpr (kWhole) {
      _mm512_storeu_si512(y + windows->offset, out);
    } else {
      for (int w = 0; w < s.at.pair->windows; ++w) {
        const PlaneWindow& to = windows[w];
        if (to.image >= s.at.images) break;
        _mm512_mask_storeu_epi16(y + to.offset, to.elements, _mm512_permutexvar_epi16(_mm512_load_si512(to.to), out));
      }
    }
  }
}

using StoreSums = void (*)(const GemmBf16Args& a, const Sums& s, int first, int last);

template <Act kAct>
inline StoreSums store_of(bool residual, bool whole) {
  if (residual) return whole ? store_sums<kAct, true, true> : store_sums<kAct, true, false>;
  return whole ? store_sums<kAct, false, true> : store_sums<kAct, false, false>;
}

// What stores these sums, filters [first, last) at a time.
inline StoreSums store_of(const GemmBf16Args& a, Act act, const Sums& s) {
  const bool residual = a.residual != nullptr;
  const bool whole = a.windows[s.at.pair->first_window].elements == 0xFFFFFFFF;
  switch (act) {
    case Act::kNone:
      return store_of<Act::kNone>(residual, whole);
    case Act::kRelu:
      return store_of<Act::kRelu>(residual, whole);
    case Act::kClamp:
      return store_of<Act::kClamp>(residual, whole);
    case Act::kCurve:
      break;
  }
  return store_of<Act::kCurve>(residual, whole);
}
