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

// Element i of a row, and of the next tap's behind it; with the upper halves of 16 floats, the lower and the upper 16.
alignas(64) constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
alignas(64) constexpr int16_t kWiden[64] = {0, 0,  0, 1,  0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,  0, 8,  0, 9,  0, 10,
                                            0, 11, 0, 12, 0, 13, 0, 14, 0, 15, 0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21,
                                            0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31};

// 16 pairs of taps of one vector. taps: those that are left, of which the last step may have fewer than 32; the rest of
// its rows are zeros, whatever x holds.
template <Gather kGather, bool kLast>
inline void gather_tile(const Bf16* x, const PanelVector& v, const int32_t* offset, int taps, Bf16* panel) {
  const __m512i index = _mm512_load_si512(kGather == Gather::kRow ? kInterleave : v.index);
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

// How 32 pixels lie in planes.
enum class Lie { kNone, kStraight, kTwo, kWindows };

// Up to two windows, in registers.
struct TwoWindows {
  __m512i index[2];
  __mmask32 elements[2], pixels[2];
  int64_t offset[2];

  TwoWindows(const PlaneWindow* w, int n, int16_t const (PlaneWindow::*table)[32]) {
    for (int i = 0; i < 2; ++i) {
      const PlaneWindow& from = w[i < n ? i : 0];
      index[i] = _mm512_loadu_si512(from.*table);
      elements[i] = i < n ? from.elements : 0;
      pixels[i] = i < n ? from.pixels : 0;
      offset[i] = from.offset;
    }
  }
};

inline int windows_there(const Sums& s, const PlaneWindow* w, int n) {
  while (n > 0 && w[n - 1].image >= s.at.images) --n;
  return n;
}

template <Act kAct, Lie kResidual, Lie kY>
void store_sums(const GemmBf16Args& a, const Sums& s, int first, int last) {
  const PlaneWindow* const windows = a.windows + s.at.pair->first_window;
  const int n = windows_there(s, windows, s.at.pair->windows);
  const PlaneWindow* const residuals =
      kResidual == Lie::kNone ? windows : a.residual_windows + s.at.pair->first_residual;
  const int residual_n = kResidual == Lie::kNone ? 0 : windows_there(s, residuals, s.at.pair->residuals);
  const TwoWindows to(windows, n, &PlaneWindow::to), from(residuals, residual_n, &PlaneWindow::from);
  const __m512 low = _mm512_set1_ps(a.epilogue.low), high = _mm512_set1_ps(a.epilogue.high);
  // bf16 goes to the upper half of its float.
  const __m512i widen = _mm512_load_si512(kWiden), widen_upper = _mm512_load_si512(kWiden + 32);
  Bf16* y = s.at.y + (s.first_filter + first) * a.y_channel_stride;
  const Bf16* residual = s.at.residual;
  if constexpr (kResidual != Lie::kNone) residual += (s.first_filter + first) * a.residual_channel_stride;
  const float* c = s.c + first * 2 * kTile;
  for (int f = first; f < last; ++f, c += 2 * kTile, y += a.y_channel_stride) {
    const __m512 bias = _mm512_set1_ps(s.bias[f]);
    __m512 v[2] = {_mm512_add_ps(_mm512_load_ps(c), bias), _mm512_add_ps(_mm512_load_ps(c + kTile), bias)};
    if constexpr (kResidual != Lie::kNone) {
      __m512i r;
      if constexpr (kResidual == Lie::kStraight) {
        r = _mm512_maskz_loadu_epi16(from.elements[0], residual + from.offset[0]);
      } else if constexpr (kResidual == Lie::kTwo) {
        r = _mm512_maskz_permutexvar_epi16(from.pixels[0], from.index[0],
                                           _mm512_maskz_loadu_epi16(from.elements[0], residual + from.offset[0]));
        r = _mm512_mask_permutexvar_epi16(r, from.pixels[1], from.index[1],
                                          _mm512_maskz_loadu_epi16(from.elements[1], residual + from.offset[1]));
      } else {
        r = _mm512_setzero_si512();
        for (int w = 0; w < residual_n; ++w) {
          r = _mm512_mask_permutexvar_epi16(
              r, residuals[w].pixels, _mm512_loadu_si512(residuals[w].from),
              _mm512_maskz_loadu_epi16(residuals[w].elements, residual + residuals[w].offset));
        }
      }
      residual += a.residual_channel_stride;
      v[0] = _mm512_add_ps(v[0], _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, widen, r)));
      v[1] = _mm512_add_ps(v[1], _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, widen_upper, r)));
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
    if constexpr (kY == Lie::kStraight) {
      const auto out = reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(to.pixels[0], v[1], v[0]));
      _mm512_mask_storeu_epi16(y + to.offset[0], to.elements[0], out);
      continue;
    }
    const auto out = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0]));
    if constexpr (kY == Lie::kTwo) {
      _mm512_mask_storeu_epi16(y + to.offset[0], to.elements[0], _mm512_permutexvar_epi16(to.index[0], out));
      _mm512_mask_storeu_epi16(y + to.offset[1], to.elements[1], _mm512_permutexvar_epi16(to.index[1], out));
    } else {
      for (int w = 0; w < n; ++w) {
        _mm512_mask_storeu_epi16(y + windows[w].offset, windows[w].elements,
                                 _mm512_permutexvar_epi16(_mm512_load_si512(windows[w].to), out));
      }
    }
  }
}

using StoreSums = void (*)(const GemmBf16Args& a, const Sums& s, int first, int last);

template <Act kAct, Lie kResidual>
inline StoreSums store_of(Lie y) {
  if (y == Lie::kStraight) return store_sums<kAct, kResidual, Lie::kStraight>;
  return y == Lie::kTwo ? store_sums<kAct, kResidual, Lie::kTwo> : store_sums<kAct, kResidual, Lie::kWindows>;
}

template <Act kAct>
inline StoreSums store_of(Lie residual, Lie y) {
  switch (residual) {
    case Lie::kNone:
      return store_of<kAct, Lie::kNone>(y);
    case Lie::kStraight:
      return store_of<kAct, Lie::kStraight>(y);
    case Lie::kTwo:
      return store_of<kAct, Lie::kTwo>(y);
    case Lie::kWindows:
      break;
  }
  return store_of<kAct, Lie::kWindows>(y);
}

// What stores these sums, filters [first, last) at a time.
inline StoreSums store_of(const GemmBf16Args& a, Act act, const Sums& s) {
  const auto lie = [](bool straight, int windows) {
    return straight ? Lie::kStraight : windows <= 2 ? Lie::kTwo : Lie::kWindows;
  };
  const Lie y = lie(s.at.pair->straight, s.at.pair->windows);
  const Lie residual = a.residual ? lie(s.at.pair->straight_residual, s.at.pair->residuals) : Lie::kNone;
  switch (act) {
    case Act::kNone:
      return store_of<Act::kNone>(residual, y);
    case Act::kRelu:
      return store_of<Act::kRelu>(residual, y);
    case Act::kClamp:
      return store_of<Act::kClamp>(residual, y);
    case Act::kCurve:
      break;
  }
  return store_of<Act::kCurve>(residual, y);
}
