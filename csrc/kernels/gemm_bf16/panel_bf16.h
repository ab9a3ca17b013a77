// What the two instruction sets with bf16 products share: panels and epilogues in AVX-512. Included inside their
// anonymous namespaces.
//
// A panel is bf16 [pair of taps][vector][16 pixels][2 taps], 16 pairs to a step.
//
// Pixels of a pair in rows stand in the order in which vpunpck leaves them: its even groups of four in the first
// vector, its odd ones in the second (row_order).

#include "kernels/gemm_bf16/walk.h"

inline constexpr int kPanelRow = kTile * 2, kPanelTile = kTile * kPanelRow;

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

// Lane i of a vector of 16 pixels gets element i of the first 16 of 32, and of the second 16 as its second tap.
alignas(64) constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// How x is read where it lies in rows.
enum class Source {
  kBf16,
  kF32,       // the caller's, rounded on the way
  kF32Edges,  // likewise, and what lies beyond the image's edge is zero
  kF32Ends,   // likewise, without a load beyond the first or last element
};

// What lies beyond the edge for the taps of a pair: a bit of 32 pixels by the tap's position in the kernel.
struct Edges {
  const uint32_t* inside;
  const int32_t* position;
  __mmask32 of(int tap) const { return inside[position[tap]]; }
};

// 32 pixels of a tap, bf16.
template <Source kSource>
inline __m512i load_row(const void* x, int64_t offset, const Edges& edges, int tap) {
  if constexpr (kSource == Source::kBf16) {
    return _mm512_loadu_si512(static_cast<const Bf16*>(x) + offset);
  } else {
    const float* p = static_cast<const float*>(x) + offset;
    if constexpr (kSource == Source::kF32) {
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + kTile), _mm512_loadu_ps(p)));
    } else {
      const __mmask32 k = edges.of(tap);
      if constexpr (kSource == Source::kF32Edges) {
        return reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(k, _mm512_loadu_ps(p + kTile), _mm512_loadu_ps(p)));
      } else {
        const auto low = static_cast<__mmask16>(k), high = static_cast<__mmask16>(k >> kTile);
        return reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, p + kTile), _mm512_maskz_loadu_ps(low, p)));
      }
    }
  }
}

// A vector of 16 pixels of two taps, interleaved.
template <Source kSource>
inline __m512i load_two_taps(const void* x, int64_t first, int64_t second, const Edges& edges, int tap) {
  const __m512i index = _mm512_load_si512(kInterleave);
  if constexpr (kSource == Source::kBf16) {
    const auto at = [&](int64_t offset) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const Bf16*>(x) + offset));
    };
    return _mm512_permutexvar_epi16(index, _mm512_inserti64x4(_mm512_castsi256_si512(at(first)), at(second), 1));
  } else {
    const float* p = static_cast<const float*>(x);
    __mmask16 a = 0xFFFF, b = 0xFFFF;
    if constexpr (kSource != Source::kF32) {
      a = static_cast<__mmask16>(edges.of(tap));
      b = static_cast<__mmask16>(edges.of(tap + 1));
    }
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(b, p + second), _mm512_maskz_loadu_ps(a, p + first));
    return _mm512_permutexvar_epi16(index, reinterpret_cast<__m512i>(both));
  }
}

// Rows of a panel, each two taps: those of a block at a place, in any number of calls.
class PanelRows {
 public:
  PanelRows() = default;

  PanelRows(const GemmBf16Args& a, const GemmBf16Block& b, const Place& at, Bf16* panel)
      : vectors_(a.vectors + at.pair->first_vector),
        x_(at.x),
        offset_(b.offset),
        edges_{a.inside + (at.pair - a.pairs) * a.positions, b.position},
        panel_(panel),
        taps_(b.taps),
        rows_(b.steps * kTile),
        run_(select(a, *at.pair)) {}

  int left() const { return rows_ - done_; }
  int done() const { return done_; }
  void gather(int rows) {
    const int last = rows < left() ? done_ + rows : rows_;
    if (done_ < last) run_(*this, done_, last);
    done_ = last;
  }

 private:
  using Run = void (*)(const PanelRows& p, int first, int last);

  // Calls body<taps>(row, its place in the panel) for rows of two taps and of a single one; what is left of the last
  // step is zeros, whatever x holds.
  template <int kVectors, class Body>
  static void each(const PanelRows& p, int first, int last, const Body& body) {
    Bf16* const panel = p.panel_;
    const auto place = [&](int r) { return panel + int64_t{r} * kVectors * kPanelRow; };
    const int whole = p.taps_ / 2, end = last < whole ? last : whole;
    int r = first;
#pragma GCC unroll 4
    for (; r < end; ++r) body.template operator()<2>(r, place(r));
    for (; r < last; ++r) {
      if (r == whole && p.taps_ % 2 == 1) {
        body.template operator()<1>(r, place(r));
      } else {
        for (int v = 0; v < kVectors; ++v) _mm512_store_si512(place(r) + v * kPanelRow, _mm512_setzero_si512());
      }
    }
  }

  // The members are copied first: the compiler takes every store for one that may change them.
  template <Source kSource>
  static void rows(const PanelRows& p, int first, int last) {
    const void* const x = p.x_;
    const int32_t* const offset = p.offset_;
    const Edges edges = p.edges_;
    const int64_t at = p.vectors_->piece[0];
    each<2>(p, first, last, [=]<int kTaps>(int r, Bf16* to) {
      const __m512i a = load_row<kSource>(x, at + offset[2 * r], edges, 2 * r);
      __m512i b = _mm512_setzero_si512();
      if (kTaps == 2) b = load_row<kSource>(x, at + offset[2 * r + 1], edges, 2 * r + 1);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + kPanelRow, _mm512_unpackhi_epi16(a, b));
    });
  }

  template <Source kSource>
  static void row(const PanelRows& p, int first, int last) {
    const void* const x = p.x_;
    const int32_t* const offset = p.offset_;
    const Edges edges = p.edges_;
    const int64_t at = p.vectors_->piece[0];
    each<1>(p, first, last, [=]<int kTaps>(int r, Bf16* to) {
      const __m512i both = load_two_taps<kSource>(x, at + offset[2 * r], at + offset[2 * r + 1], edges, 2 * r);
      _mm512_store_si512(to, _mm512_maskz_mov_epi16(kTaps == 2 ? 0xFFFFFFFF : 0x55555555, both));
    });
  }

  template <int kVectors>
  static void tables(const PanelRows& p, int first, int last) {
    const auto* const x = static_cast<const Bf16*>(p.x_);
    const int32_t* const offset = p.offset_;
    const PanelVector* const vectors = p.vectors_;
    each<kVectors>(p, first, last, [=]<int kTaps>(int r, Bf16* to) {
      for (int v = 0; v < kVectors; ++v, to += kPanelRow) {
        const __m512i both = table_row(x, vectors[v], offset[2 * r], offset[2 * r + 1]);
        _mm512_store_si512(to, _mm512_maskz_mov_epi16(kTaps == 2 ? 0xFFFFFFFF : 0x55555555, both));
      }
    });
  }

  static __m512i table_row(const Bf16* x, const PanelVector& v, int64_t first, int64_t second) {
    const auto both = [&]<Gather kGather>() {
      return _mm512_permutex2var_epi16(load_pixels<kGather>(x, v, first), _mm512_load_si512(v.index),
                                       load_pixels<kGather>(x, v, second));
    };
    switch (v.gather) {
      case Gather::kRow:
        return load_two_taps<Source::kBf16>(x, v.piece[0] + first, v.piece[0] + second, {}, 0);
      case Gather::kWindow:
        return both.template operator()<Gather::kWindow>();
      case Gather::kHalves:
        return both.template operator()<Gather::kHalves>();
      case Gather::kQuarters:
        return both.template operator()<Gather::kQuarters>();
      case Gather::kTwoWindows: {
        const __m512i index = _mm512_load_si512(v.index);
        const auto tap = [&](int64_t offset) {
          return _mm512_permutex2var_epi16(_mm512_loadu_si512(x + v.piece[0] + offset), index,
                                           _mm512_loadu_si512(x + v.piece[1] + offset));
        };
        return _mm512_mask_mov_epi16(tap(first), 0xAAAAAAAA, tap(second));
      }
      case Gather::kLanes:
        break;
    }
    alignas(64) Bf16 lanes[2 * kTile];
    for (int i = 0; i < kTile; ++i) {
      lanes[2 * i] = x[v.lane[i] + first];
      lanes[2 * i + 1] = x[v.lane[i] + second];
    }
    return _mm512_load_si512(lanes);
  }

  static Run select(const GemmBf16Args& a, const PanelPair& pair) {
    const bool two = pair.vectors == 2;
    if (pair.read == Read::kEnds) return two ? rows<Source::kF32Ends> : row<Source::kF32Ends>;
    if (pair.read == Read::kEdges) return two ? rows<Source::kF32Edges> : row<Source::kF32Edges>;
    if (a.x_f32) return two ? rows<Source::kF32> : row<Source::kF32>;
    if (pair.read == Read::kRow) return two ? rows<Source::kBf16> : row<Source::kBf16>;
    return two ? tables<2> : tables<1>;
  }

  const PanelVector* vectors_ = nullptr;
  const void* x_ = nullptr;
  const int32_t* offset_ = nullptr;
  Edges edges_{};
  Bf16* panel_ = nullptr;
  int taps_ = 0, rows_ = 0, done_ = 0;
  Run run_ = nullptr;
};

// kFloor: low alone, -infinity where there is none.
enum class Act { kFloor, kClamp, kCurve };

inline Act act_of(const Epilogue& e) {
  if (e.activation != Activation::kClamp) return Act::kCurve;
  return e.high != __builtin_huge_valf() ? Act::kClamp : Act::kFloor;
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

// How 32 pixels lie in planes: in so many windows.
enum class Lie { kNone, kOne, kTwo, kMany };

inline int windows_there(const Place& at, const PlaneWindow* w, int n) {
  while (n > 0 && w[n - 1].image >= at.images) --n;
  return n;
}

// Up to two windows that are read, in registers: element from[i] becomes the upper half of float i, zero its lower.
struct ReadWindows {
  __m512i index[2][2];
  __mmask32 elements[2], lanes[2][2];
  int64_t offset[2];

  ReadWindows(const PlaneWindow* w, int n) {
    for (int i = 0; i < 2; ++i) {
      const PlaneWindow& from = w[i < n ? i : 0];
      elements[i] = i < n ? from.elements : 0;
      offset[i] = from.offset;
      for (int v = 0; v < 2; ++v) {
        const auto* index16 = reinterpret_cast<const __m256i*>(from.from + v * kTile);
        index[i][v] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(index16)), 16);
        lanes[i][v] = i < n ? upper_halves(static_cast<uint16_t>(from.pixels >> v * kTile)) : 0;
      }
    }
  }

  // Bit i to bit 2 i + 1.
  static __mmask32 upper_halves(uint16_t bits) { return _mm512_movepi16_mask(_mm512_maskz_set1_epi32(bits, -65536)); }
};

// Up to two windows that are written.
struct WriteWindows {
  __m512i index[2];
  __mmask32 elements[2], filled[2];
  int64_t offset[2];

  WriteWindows(const PlaneWindow* w, int n) {
    for (int i = 0; i < 2; ++i) {
      const PlaneWindow& to = w[i < n ? i : 0];
      index[i] = _mm512_load_si512(to.to);
      elements[i] = i < n ? to.elements : 0;
      filled[i] = i < n ? to.filled : 0;
      offset[i] = to.offset;
    }
  }
};

inline void store_window(float* y, __m512i to, __mmask32 elements, __mmask32 filled, __m512 v0, __m512 v1) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(to));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(to, 1));
  _mm512_mask_storeu_ps(y, static_cast<__mmask16>(elements),
                        _mm512_maskz_permutex2var_ps(static_cast<__mmask16>(filled), v0, low, v1));
  _mm512_mask_storeu_ps(y + kTile, static_cast<__mmask16>(elements >> kTile),
                        _mm512_maskz_permutex2var_ps(static_cast<__mmask16>(filled >> kTile), v0, high, v1));
}

inline void store_window(Bf16* y, __m512i to, __mmask32 elements, __mmask32 filled, __m512 v0, __m512 v1) {
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0));
  _mm512_mask_storeu_epi16(y, elements, _mm512_maskz_permutexvar_epi16(filled, to, both));
}

template <Act kAct, Lie kResidual, class Out, Lie kY>
void store_sums(const GemmBf16Args& a, const Sums& s, int first, int last) {
  const PlaneWindow* const windows = a.windows + s.at.pair->first_window;
  const int n = windows_there(s.at, windows, s.at.pair->windows);
  const PlaneWindow* const residuals =
      kResidual == Lie::kNone ? windows : a.residual_windows + s.at.pair->first_residual;
  const int residual_n = kResidual == Lie::kNone ? 0 : windows_there(s.at, residuals, s.at.pair->residuals);
  const WriteWindows to(windows, n);
  const ReadWindows from(residuals, residual_n);
  const __m512 low = _mm512_set1_ps(a.epilogue.low), high = _mm512_set1_ps(a.epilogue.high);
  Out* y = static_cast<Out*>(s.at.y) + (s.first_filter + first) * a.y_channel_stride;
  const Bf16* residual = s.at.residual;
  if constexpr (kResidual != Lie::kNone) residual += (s.first_filter + first) * a.residual_channel_stride;
  const float* c = s.c + first * 2 * kTile;
  for (int f = first; f < last; ++f, c += 2 * kTile, y += a.y_channel_stride) {
    const __m512 bias = _mm512_set1_ps(s.bias[f]);
    __m512 v0 = _mm512_add_ps(_mm512_load_ps(c), bias), v1 = _mm512_add_ps(_mm512_load_ps(c + kTile), bias);
    if constexpr (kResidual != Lie::kNone) {
      const auto add = [&](const ReadWindows& w, int i) {
        const __m512i r = _mm512_maskz_loadu_epi16(w.elements[i], residual + w.offset[i]);
        const auto part = [&](int v) {
          return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(w.lanes[i][v], w.index[i][v], r));
        };
        v0 = _mm512_add_ps(v0, part(0));
        v1 = _mm512_add_ps(v1, part(1));
      };
      if constexpr (kResidual == Lie::kMany) {
        for (int i = 0; i < residual_n; ++i) add(ReadWindows(residuals + i, 1), 0);
      } else {
        add(from, 0);
        if constexpr (kResidual == Lie::kTwo) add(from, 1);
      }
      residual += a.residual_channel_stride;
    }
    if constexpr (kAct == Act::kCurve) {
      v0 = curve(v0, a.epilogue);
      v1 = curve(v1, a.epilogue);
    } else {
      // The second operand is returned where one is NaN.
      v0 = _mm512_max_ps(low, v0);
      v1 = _mm512_max_ps(low, v1);
      if constexpr (kAct == Act::kClamp) {
        v0 = _mm512_min_ps(high, v0);
        v1 = _mm512_min_ps(high, v1);
      }
    }
    if constexpr (kY == Lie::kMany) {
      for (int i = 0; i < n; ++i) {
        const PlaneWindow& w = windows[i];
        store_window(y + w.offset, _mm512_load_si512(w.to), w.elements, w.filled, v0, v1);
      }
    } else {
      store_window(y + to.offset[0], to.index[0], to.elements[0], to.filled[0], v0, v1);
      if constexpr (kY == Lie::kTwo) store_window(y + to.offset[1], to.index[1], to.elements[1], to.filled[1], v0, v1);
    }
  }
}

using StoreSums = void (*)(const GemmBf16Args& a, const Sums& s, int first, int last);

template <Act kAct, Lie kResidual>
inline StoreSums store_of(bool f32, Lie y) {
  if (f32)
    return y == Lie::kOne ? store_sums<kAct, kResidual, float, Lie::kOne>
                          : store_sums<kAct, kResidual, float, Lie::kMany>;
  if (y == Lie::kOne) return store_sums<kAct, kResidual, Bf16, Lie::kOne>;
  return y == Lie::kTwo ? store_sums<kAct, kResidual, Bf16, Lie::kTwo> : store_sums<kAct, kResidual, Bf16, Lie::kMany>;
}

template <Act kAct>
inline StoreSums store_of(Lie residual, bool f32, Lie y) {
  switch (residual) {
    case Lie::kNone:
      return store_of<kAct, Lie::kNone>(f32, y);
    case Lie::kOne:
      return store_of<kAct, Lie::kOne>(f32, y);
    case Lie::kTwo:
      return store_of<kAct, Lie::kTwo>(f32, y);
    case Lie::kMany:
      break;
  }
  return store_of<kAct, Lie::kMany>(f32, y);
}

// What stores these sums, filters [first, last) at a time.
inline StoreSums store_of(const GemmBf16Args& a, Act act, const Sums& s) {
  const auto lie = [](int windows) { return windows <= 1 ? Lie::kOne : windows == 2 ? Lie::kTwo : Lie::kMany; };
  const Lie y = lie(s.at.pair->windows);
  const Lie residual = a.residual ? lie(s.at.pair->residuals) : Lie::kNone;
  switch (act) {
    case Act::kFloor:
      return store_of<Act::kFloor>(residual, a.y_f32, y);
    case Act::kClamp:
      return store_of<Act::kClamp>(residual, a.y_f32, y);
    case Act::kCurve:
      break;
  }
  return store_of<Act::kCurve>(residual, a.y_f32, y);
}
