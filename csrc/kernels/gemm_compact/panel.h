// collect and panel over a type V of vectors: see generic.h, behind which it is included.

// Lane i from at[lane[i]], where that is in x.
template <class V>
__attribute__((noinline)) void collect_one(const float* at, const PixelVector& v, unsigned inside, float* to) {
  for (int i = 0; i < V::kLanes; ++i) to[i] = inside >> i & 1 ? at[v.lane[i]] : 0.0f;
}

template <class V, Reads R, bool WithEdges, int NR>
void collect(const CollectArgs& a) {
  constexpr int kWindow = window_of(R);
  const float* base[NR];
  typename V::Index index[NR];
  int64_t gap[NR] = {};
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    base[v] = a.x + a.vectors[v].offset;
    if constexpr (R == Reads::kTwoRuns) gap[v] = a.vectors[v].lane[V::kLanes - 1] - (V::kLanes - 1);
    if constexpr (R != Reads::kWindow1) index[v] = V::index(a.vectors[v].lane);
  }
  float* to = a.copy;
  // Masked loads may begin anywhere: what they leave out may lie outside x.
  if constexpr (WithEdges && V::kMasks && (R == Reads::kWindow1 || R == Reads::kTwoRuns)) {
    typename V::Lanes behind[NR] = {};
    for (int v = 0; R == Reads::kTwoRuns && v < NR; ++v) behind[v] = V::behind(index[v]);
    for (int64_t t = 0; t < a.n_taps; ++t, to += NR * V::kLanes) {
      const uint16_t* const inside = a.edges.inside + a.edges.position[t];
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) {
        const float* const at = base[v] + a.offset[t];
        const auto lanes = V::lanes(inside[v * a.edges.positions]);
        if constexpr (R == Reads::kWindow1) {
          V::store(to + v * V::kLanes, V::load_lanes(at, lanes));
        } else {
          V::store(to + v * V::kLanes, V::load_runs(at, at + gap[v], lanes, behind[v]));
        }
      }
    }
    return;
  }
  // Where padding is wider than the map, the vectors of a tile do not ascend.
  const float *low = base[0], *high = base[0];
  for (int v = 1; v < NR; ++v) {
    low = base[v] < low ? base[v] : low;
    high = base[v] > high ? base[v] : high;
  }
  alignas(64) float mask[WithEdges ? kMaxEdgePositions : 1][NR][V::kLanes];
  if constexpr (WithEdges) {
    for (int p = 0; p < a.edges.positions; ++p) {
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) {
        V::store_mask(mask[p][v], V::lanes(a.edges.inside[v * a.edges.positions + p]));
      }
    }
  }
  // Vectors are stored through pointers that may point at anything: what a loop needs is in locals, and read once.
  const int64_t n_taps = a.n_taps, *const offset = a.offset;
  const uint8_t* const position = a.edges.position;
  for (int64_t t = 0; t < n_taps; ++t, to += NR * V::kLanes) {
    const int64_t tap = offset[t];
    const float (*masks)[V::kLanes] = nullptr;
    if constexpr (WithEdges) {
      if (low + tap < a.edges.first || high + tap + kWindow * V::kLanes > a.edges.end) {
        for (int v = 0; v < NR; ++v) {
          const unsigned inside = a.edges.inside[v * a.edges.positions + position[t]];
          collect_one<V>(base[v] + tap, a.vectors[v], inside, to + v * V::kLanes);
        }
        continue;
      }
      masks = mask[position[t]];
    }
    typename V::Reg r[NR];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) {
      const float* const at = base[v] + tap;
      if constexpr (R == Reads::kWindow1) {
        r[v] = V::load(at);
      } else if constexpr (R == Reads::kWindow2) {
        r[v] = V::gather(at, index[v]);
      } else if constexpr (R == Reads::kWindow4) {
        r[v] = V::gather4(at, index[v]);
      } else if constexpr (R == Reads::kTwoRuns) {
        r[v] = V::two_runs(at, at + gap[v], index[v]);
      } else if constexpr (R == Reads::kAlternate) {
        r[v] = V::alternate(at);
      } else {
        r[v] = V::fourth(at);
      }
      if constexpr (WithEdges) r[v] = V::masked(r[v], masks[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) V::store(to + v * V::kLanes, r[v]);
  }
}

// sum[m][v] += w[m] * x[v][at] for one tap, or for kRun of them that lie one behind the other in a copy.
template <class V, int MR, int NR>
struct Taps {
  using Sums = typename V::Reg[MR][NR];
  static constexpr int kRun = V::kRun;
  static void one(Sums& sum, const float* const (&x)[NR], int64_t at, const float* w) {
    typename V::Reg px[NR];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) px[v] = V::load(x[v] + at);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::Reg wm = V::broadcast(w + m);
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) sum[m][v] = V::fma(wm, px[v], sum[m][v]);
    }
  }
  static void run(Sums& sum, const float* x, const float* w, int64_t w_stride) {
    const float* at[NR];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) at[v] = x + v * V::kLanes;
#pragma GCC unroll 4
    for (int i = 0; i < kRun; ++i) one(sum, at, i * NR * V::kLanes, w + i * w_stride);
  }
};

// With fewer taps in a call, y and the residual are not fetched: the stores would come before, and a 1x1 layer of six
// taps took a quarter longer.
constexpr int64_t kFetchTaps = 32;
enum class Fetch { kNothing, kWeights, kPlanes };

// MR filters at a time, and Tail where no more are left: enough sums to keep two units of multiply-adds busy, whatever
// NR. Weights and biases of filters that are not there are read (a packed weight has its biases, and zeros, behind it).
// kPast: GemmCompact::panel_past_caches.
template <class V, From F, int MR, int Tail, int NR, bool kPast = false>
void panel(const PanelArgs& a) {
  // Twice Tail, where each has sums enough, rather than MR of which some filters are not there.
  constexpr int kTail = Tail * NR >= 8 && 2 * Tail < MR ? 2 * Tail : Tail;
  constexpr uint32_t kAll = (uint64_t{1} << V::kLanes) - 1;
  const Output& o = a.out;
  const bool clamp = a.last && o.epilogue.activation == Activation::kClamp;
  const float* ahead = a.ahead;
  for (int i = 0; i < a.n_tiles; ++i) {
    const PanelTile& tile = a.tiles[i];
    // Whether the tile goes to y from registers, as it is; whether all of its lanes do; and whether those are lines.
    bool whole = clamp, full = true, lines = kPast && o.y_stride % kFloatsPerLine == 0;
    float* y[NR];
    const float* residual[NR];
    const float* base[NR];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) {
      const PixelVector& p = tile.vectors[v];
      whole = whole && (V::kMasks ? p.straight > 0 : p.straight == V::kLanes) && p.image < tile.images;
      full = full && p.lanes == kAll;
      y[v] = o.y + tile.y + p.y;
      lines = lines && reinterpret_cast<uintptr_t>(y[v]) % 64 == 0;
      residual[v] = o.residual ? o.residual + tile.residual + p.residual : nullptr;
      base[v] = F == From::kPlanes ? tile.x + p.offset : tile.x + v * V::kLanes;
    }
    lines = lines && full;
    typename V::Lanes lanes[NR];
    if (V::kMasks || !full) {
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) lanes[v] = V::lanes(tile.vectors[v].lanes);
    }
    const float* const next = a.next && i == a.n_tiles - 1 ? a.next : ahead;
    if (ahead) ahead = a.filters * a.n_taps < a.ahead_end - ahead ? ahead + a.filters * a.n_taps : nullptr;
    const auto some = [&](auto rows, int first) {
      constexpr int kRows = decltype(rows)::value;
      float* const sums = tile.sums + a.sums + first * NR * V::kLanes;
      // y and the residual come from wherever the layer before left them, and that is far: the weights went by since.
      if (whole && a.n_taps >= kFetchTaps) {
        // Where the vectors begin, and where the last one ends: they are neighbours, or of two rows. Inlined, or the
        // compiler takes it for a function without effect.
        const auto fetch = [&](const auto& from, int64_t stride) __attribute__((always_inline)) {
          const float* at[NR];
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) at[v] = from[v] + first * stride + (v == NR - 1 ? V::kLanes - 1 : 0);
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < NR; ++v) __builtin_prefetch(at[v] + m * stride);
          }
        };
        if (!lines) fetch(y, o.y_stride);
        if (o.residual && (lines || o.residual != o.y)) fetch(residual, o.residual_stride);
      }
      typename V::Reg acc[kRows][NR];
      if (a.bias) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          acc[m][0] = V::broadcast(a.bias + first + m);
#pragma GCC unroll 8
          for (int v = 1; v < NR; ++v) acc[m][v] = acc[m][0];
        }
      } else {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) acc[m][v] = V::load(sums + (m * NR + v) * V::kLanes);
        }
      }
      const auto run = [&](auto fetch) {
        using T = Taps<V, kRows, NR>;
        constexpr int64_t kTile = NR * V::kLanes;
        const float *w = a.w + first, *line = next + first * a.n_taps;  // as many as it reads itself
        const int64_t n_taps = a.n_taps, w_stride = a.w_stride;
        int64_t t = 0;
        // Some taps at a time: a core that another thread shares is short of places for all that is not a multiply-add.
        for (; t + T::kRun <= n_taps; t += T::kRun, w += T::kRun * w_stride) {
          if constexpr (decltype(fetch)::value == Fetch::kWeights) {
            __builtin_prefetch(line);
            line += T::kRun * kRows;
          }
          if constexpr (decltype(fetch)::value == Fetch::kPlanes) {
#pragma GCC unroll 4
            for (int k = 0; k < T::kRun; ++k) {
#pragma GCC unroll 8
              for (int v = 0; v < NR; ++v) __builtin_prefetch(base[v] + tile.ahead + a.offset[t + k], 0, 2);
            }
          }
          if constexpr (F == From::kCopy) {
            T::run(acc, tile.x + t * kTile, w, w_stride);
            continue;
          }
#pragma GCC unroll 4
          for (int k = 0; k < T::kRun; ++k) {
            T::one(acc, base, F == From::kPlanes ? a.offset[t + k] : a.slot[t + k] * kTile, w + k * w_stride);
          }
        }
        if constexpr (T::kRun > 1) {
          for (; t < n_taps; ++t, w += w_stride) {
            T::one(acc, base, F == From::kPlanes ? a.offset[t] : (F == From::kCopy ? t : a.slot[t]) * kTile, w);
          }
        }
      };
      if (F == From::kPlanes && a.fetch_planes && tile.ahead != 0 && first == 0) {
        if constexpr (F == From::kPlanes) run(std::integral_constant<Fetch, Fetch::kPlanes>{});
      } else if (next) {
        run(std::integral_constant<Fetch, Fetch::kWeights>{});
      } else {
        run(std::integral_constant<Fetch, Fetch::kNothing>{});
      }
      if (!a.last) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) V::store(sums + (m * NR + v) * V::kLanes, acc[m][v]);
        }
      } else if (whole && a.filters - first >= kRows) {
        // Copies, for what the lambda captured is read from memory, vector by vector.
        float* to[NR];
        typename V::Lanes inside[NR];
#pragma GCC unroll 8
        for (int v = 0; v < NR; ++v) to[v] = y[v] + first * o.y_stride;
        if (V::kMasks || !full) {
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) inside[v] = lanes[v];
        }
        const int64_t y_stride = o.y_stride;
        const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
        if (o.residual) {
          const float* add[NR];
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) add[v] = residual[v] + first * o.residual_stride;
          const int64_t stride = o.residual_stride;
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < NR; ++v) {
              if constexpr (V::kMasks) {
                acc[m][v] = V::add(acc[m][v], V::load_lanes(add[v] + m * stride, inside[v]));
              } else {
                acc[m][v] = V::add(acc[m][v], V::load(add[v] + m * stride));
              }
            }
          }
        }
        const auto put = [&](auto limited, auto store) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < NR; ++v) {
              auto r = V::max(low, acc[m][v]);
              if constexpr (decltype(limited)::value) r = V::min(high, r);
              store(to[v] + m * y_stride, r, v);
            }
          }
        };
        const auto put_limited = [&](auto store) __attribute__((always_inline)) {
          if (o.epilogue.high < __builtin_inff()) {
            put(std::true_type{}, store);
          } else {
            put(std::false_type{}, store);
          }
        };
        if (kPast && lines) {
          if constexpr (kPast) put_limited([](float* p, auto r, int) { V::stream(p, r); });
        } else if constexpr (V::kMasks) {
          put_limited([&](float* p, auto r, int v) { V::store_lanes(p, inside[v], r); });
        } else if (full) {
          put_limited([](float* p, auto r, int) { V::store(p, r); });
        } else {
          put_limited([&](float* p, auto r, int v) { V::store(p, V::only(r, inside[v])); });
        }
      } else {
        Output rest = o;
        rest.y += tile.y + first * o.y_stride;
        if (o.residual) rest.residual += tile.residual + first * o.residual_stride;
        rest.images = tile.images;
        put_tile<V, kRows, NR>(acc, tile.vectors, a.filters - first, rest);
      }
    };
    int first = 0;
    for (; a.filters - first > kTail; first += MR) some(std::integral_constant<int, MR>{}, first);
    if constexpr (Tail > 0) {
      for (; first < a.filters; first += Tail) some(std::integral_constant<int, Tail>{}, first);
    }
  }
}

// The tables of struct GemmCompact, for up to N vectors.
template <class V, Reads R, int... I>
constexpr void fill_collect(GemmCompact& g, std::integer_sequence<int, I...>) {
  ((g.collect[static_cast<int>(R)][I] = &collect<V, R, false, I + 1>), ...);
  ((g.collect_edges[static_cast<int>(R)][I] = &collect<V, R, true, I + 1>), ...);
}
template <class V, int N>
constexpr void fill_collect(GemmCompact& g) {
  fill_collect<V, Reads::kWindow1>(g, upto<N>());
  fill_collect<V, Reads::kWindow2>(g, upto<N>());
  fill_collect<V, Reads::kWindow4>(g, upto<N>());
  fill_collect<V, Reads::kTwoRuns>(g, upto<N>());
  fill_collect<V, Reads::kAlternate>(g, upto<N>());
  fill_collect<V, Reads::kFourth>(g, upto<N>());
}
