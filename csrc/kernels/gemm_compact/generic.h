// Stores, and the filters kernels, over a type V of vectors; V::kMasks: whether masked loads and stores cost no more
// than whole ones; V::kRun: taps that a loop takes at a time. Included by the ISA files inside their anonymous
// namespaces, so that nothing compiled for one instruction set can be called by another.

constexpr int kFloatsPerLine = 16;

// Some vectors of sums, one per filter, to where a PixelStore says.
template <class V>
struct Placed {
  typename V::Index from;
  typename V::Lanes lanes;
  typename V::Reg low, high;
  const float* residual;
  float* y;

  Placed(const PixelStore& s, const Output& o)
      : from(V::index(s.from)),
        lanes(V::lanes(s.lanes)),
        low(V::broadcast(&o.epilogue.low)),
        high(V::broadcast(&o.epilogue.high)),
        residual(o.residual ? o.residual + s.residual : nullptr),
        y(o.y + s.y) {}

  typename V::Reg sum(typename V::Reg r, const Output& o, int filter) const {
    r = V::permute(r, from);
    return residual ? V::add(r, V::load_lanes(residual + filter * o.residual_stride, lanes)) : r;
  }
  // max(low, r) and min(high, r) keep a NaN in r. No branch for what is straight or without a limit: a tile has this
  // two dozen times, and with the branches most layers were slower (by 7 to 18 %).
  void put(typename V::Reg r, const Output& o, int filter) const {
    V::store_lanes(y + filter * o.y_stride, lanes, V::min(high, V::max(low, sum(r, o, filter))));
  }
};

// Whether a whole vector goes to y as it is, but for zeros in the halo.
template <class V>
inline bool is_whole(const PixelStore& s) {
  return s.straight && s.count == V::kLanes;
}

// `filters` vectors of sums in memory, `apart` floats from one to the next.
template <class V>
__attribute__((noinline)) void put_all(const float* sums, int apart, int filters, const PixelStore* s, int stores,
                                       const Output& o) {
  const bool curve = o.epilogue.activation != Activation::kClamp;
  for (const PixelStore* const end = s + stores; s != end && s->image < o.images; ++s) {
    const Placed<V> place(*s, o);
    const auto put = [&](auto store) {
      if (curve) {
        for (int f = 0; f < filters; ++f) {
          store(place.y + f * o.y_stride, V::curve(place.sum(V::load(sums + f * apart), o, f), o.epilogue));
        }
      } else {
        for (int f = 0; f < filters; ++f) {
          const auto r = place.sum(V::load(sums + f * apart), o, f);
          store(place.y + f * o.y_stride, V::min(place.high, V::max(place.low, r)));
        }
      }
    };
    if constexpr (V::kMasks) {
      put([&](float* y, typename V::Reg r) { V::store_lanes(y, place.lanes, r); });
    } else {
      V::with_store(s->count,
                    [&](auto store) { put([&](float* y, typename V::Reg r) { store(y, V::only(r, place.lanes)); }); });
    }
  }
}

// A tile of sums to where the stores of its vectors say.
template <class V, int MR, int NR>
inline void put_tile(const typename V::Reg (&acc)[MR][NR], const PixelVector* vectors, int filters, const Output& o) {
  if constexpr (V::kMasks) {
    if (o.epilogue.activation == Activation::kClamp) {
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) {
        const PixelStore* s = o.stores + vectors[v].first_store;
        for (int i = 0; i < vectors[v].stores && s->image < o.images; ++i, ++s) {
          const Placed<V> place(*s, o);
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m) {
            if (m >= filters) break;
            place.put(acc[m][v], o, m);
          }
        }
      }
      return;
    }
  }
  // Whole vectors that lie in y as they are, or in two rows of it, go there from registers, the others by way of
  // memory.
  const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
  const bool plain = !V::kMasks && o.epilogue.activation == Activation::kClamp && filters >= MR;
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    const PixelVector& p = vectors[v];
    if constexpr (!V::kMasks) {
      float* y = o.y + p.y;
      const float* residual = o.residual ? o.residual + p.residual : nullptr;
      if (plain && p.straight == V::kLanes && p.image < o.images) {
        const auto lanes = V::lanes(p.lanes);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m, y += o.y_stride) {
          const auto r = residual ? V::add(acc[m][v], V::load(residual + m * o.residual_stride)) : acc[m][v];
          V::store(y, V::only(V::min(high, V::max(low, r)), lanes));
        }
        continue;
      }
      if (plain && p.run > 0 && p.image < o.images) {
        // Two whole vectors, the second of which ends with the lanes that the first one, written over it, has no place
        // for.
        const auto first = V::lanes(((1u << p.run) - 1) | (~0u << (p.run + p.gap))), second = V::lanes_from(p.run);
        const auto index = V::index_with_gap(p.run, p.gap);
        const int gap = p.gap, residual_gap = p.residual_gap;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m, y += o.y_stride) {
          auto r = acc[m][v];
          if (residual) {
            r = V::add(r, V::blend(V::load(residual), V::load(residual + residual_gap), second));
            residual += o.residual_stride;
          }
          r = V::min(high, V::max(low, r));
          V::store(y + gap, V::only(r, second));
          V::store(y, V::only(V::permute(r, index), first));
        }
        continue;
      }
    }
    alignas(64) float sums[MR][V::kLanes];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) V::store(sums[m], acc[m][v]);
    put_all<V>(sums[0], V::kLanes, filters < MR ? filters : MR, o.stores + p.first_store, p.stores, o);
  }
}

// P vectors of filters, the first of them `first`, as rows: filters are neighbours in y.
template <class V, int P>
inline void put_rows(const FiltersArgs& a, int first, const typename V::Reg (&r)[P]) {
  const int n = a.filters - first < V::kLanes ? a.filters - first : V::kLanes;
  float* const y = a.out.y + first;
  if (n == V::kLanes && !a.out.residual && a.out.epilogue == Epilogue{}) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) V::store(y + a.row[p], r[p]);
    return;
  }
  using A = typename V::Across;
  alignas(64) float tile[P][V::kLanes];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) V::store(tile[p], r[p]);
  PixelStore s{};
  for (int i = 0; i < A::kLanes; ++i) s.from[i] = static_cast<int8_t>(i);
  for (int f = 0; f < n; f += A::kLanes) {
    const int some = n - f < A::kLanes ? n - f : A::kLanes;
    s.lanes = (1u << some) - 1;
    s.count = static_cast<int8_t>(some);
    s.straight = true;
    for (int p = 0; p < P; ++p) {
      s.y = first + f + a.row[p];
      if (a.out.residual) s.residual = first + f + a.residual_row[p];
      alignas(64) float sums[A::kLanes];
      for (int i = 0; i < some; ++i) sums[i] = tile[p][f + i];
      put_all<A>(sums, A::kLanes, 1, &s, 1, a.out);
    }
  }
}

// W is the width of a panel, kPer vectors.
template <class V, int W, int NV, int P>
void filters(const FiltersArgs& a) {
  constexpr int kPer = W / V::kLanes, kVectors = kPer * NV, kAhead = 48;
  typename V::Reg acc[P][kVectors];
  const auto begin = [&](int64_t stride) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[p][v] = V::load(a.start + p * stride + v * V::kLanes);
    }
  };
  if (a.start_stride == 0) {
    begin(0);  // loads that the pixels share
  } else {
    begin(a.start_stride);
  }
  const float* const ahead = a.x + a.ahead;
  const int64_t *const end = a.offset + a.n_taps, *const whole = end - a.n_taps % V::kRun;
  const auto run = [&](auto place, auto fetch) {
    const float* w = a.w;
    const char* stream = static_cast<const char*>(a.stream);
    const auto tap = [&](int64_t offset, const float* wt) {
      if constexpr (decltype(fetch)::value) {
        __builtin_prefetch(ahead + offset, 0, 2);
        __builtin_prefetch(stream, 0, 2);
        stream += 64;
      }
      typename V::Reg wv[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const float* const at = wt + (v / kPer) * a.panel_stride + (v % kPer) * V::kLanes;
        wv[v] = V::load(at);
        // Several panels are more streams than the hardware prefetcher of L1 follows. So far ahead, for the weights of
        // late layers come from beyond L2 (ResNet-18's fourth stage took a seventh longer with eight taps).
        if constexpr (NV > 1) __builtin_prefetch(at + kAhead * W);
      }
      const auto px = place(offset);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const typename V::Reg xp = V::broadcast(px(p));
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[p][v] = V::fma(xp, wv[v], acc[p][v]);
      }
    };
    const int64_t* offset = a.offset;
    for (; offset != whole; offset += V::kRun, w += V::kRun * W) {
#pragma GCC unroll 4
      for (int i = 0; i < V::kRun; ++i) tap(offset[i], w + i * W);
    }
    if constexpr (V::kRun > 1) {
      for (; offset != end; ++offset, w += W) tap(*offset, w);
    }
  };
  // The first and last do not tell: outputs that share a halo may read one place twice.
  bool neighbours = true;
  for (int p = 1; p < P; ++p) neighbours &= a.pixel[p] == a.pixel[0] + p;
  if (neighbours) {
    // Pixels of one row need one pointer, not more than there are registers. Left to itself, the compiler adds up each
    // address: a sixth of the kernel's instructions.
    const float* const first = a.x + a.pixel[0];
    const auto place = [=](int64_t offset) {
      const float* px = first + offset;
      asm("" : "+r"(px));
      return [=](int p) { return px + p; };
    };
    if (a.stream) {
      run(place, std::true_type{});
    } else {
      run(place, std::false_type{});
    }
  } else {
    const float* px[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) px[p] = a.x + a.pixel[p];
    run([&](int64_t offset) { return [&px, offset](int p) { return px[p] + offset; }; }, std::false_type{});
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const int first = v * V::kLanes;
    if (first >= a.filters) break;
    typename V::Reg column[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) column[p] = acc[p][v];
    if (a.row) {
      put_rows<V, P>(a, first, column);
      continue;
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) V::store(a.sums + p * a.sums_stride + first, column[p]);
  }
}

template <int N>
inline void transpose_plainly(const float* sums, int64_t stride, float (&out)[N][N]) {
  for (int p = 0; p < N; ++p) {
    for (int f = 0; f < N; ++f) out[f][p] = sums[p * stride + f];
  }
}

// A store of the vectors of a span, with what is the same for all filters at hand.
struct SpanStore {
  int vector;
  uint32_t lanes;
  int64_t y, residual;
  const int8_t* from;
};

enum class Limits { kLow, kBoth, kCurve };

// Filter by filter, so that few pages are written at a time.
template <class V, class T, bool kStraight, bool kResidual, Limits kLimits>
inline void spread_stores(const SpreadArgs& a, const SpanStore* stores, int count) {
  constexpr int N = V::kLanes;
  const Output& o = a.out;
  const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
  for (int first = 0; first < a.filters; first += N) {
    alignas(64) float block[kMaxSpan / N][N][N];
    for (int v = 0; v < a.vectors; ++v) V::transpose(a.sums + first + v * N * a.sums_stride, a.sums_stride, block[v]);
    const int filters = a.filters - first < N ? a.filters - first : N;
    T* y = reinterpret_cast<T*>(o.y) + first * o.y_stride;
    const T* residual = reinterpret_cast<const T*>(o.residual) + (kResidual ? first * o.residual_stride : 0);
    for (int f = 0; f < filters; ++f, y += o.y_stride) {
      for (int i = 0; i < count; ++i) {
        const SpanStore& s = stores[i];
        auto r = V::load(block[s.vector][f]);
        const auto lanes = V::lanes(s.lanes);
        if constexpr (!kStraight) r = V::permute(r, V::index(s.from));
        if constexpr (kResidual) r = V::add(r, V::load_lanes(residual + s.residual, lanes));
        if constexpr (kLimits == Limits::kCurve) {
          r = V::curve(r, o.epilogue);
        } else {
          r = V::max(low, r);
          if constexpr (kLimits == Limits::kBoth) r = V::min(high, r);
        }
        V::store_lanes(y + s.y, lanes, r);
      }
      if constexpr (kResidual) residual += o.residual_stride;
    }
  }
}

template <class V, class T, bool kStraight, bool kResidual>
inline void spread_stores(const SpreadArgs& a, const SpanStore* stores, int count) {
  const Epilogue& e = a.out.epilogue;
  if (e.activation != Activation::kClamp)
    return spread_stores<V, T, kStraight, kResidual, Limits::kCurve>(a, stores, count);
  if (e.high < __builtin_inff()) return spread_stores<V, T, kStraight, kResidual, Limits::kBoth>(a, stores, count);
  return spread_stores<V, T, kStraight, kResidual, Limits::kLow>(a, stores, count);
}

template <class V, class T>
inline void spread_by_lanes(const SpreadArgs& a) {
  SpanStore stores[kMaxSpan];  // a pixel each, at most
  int count = 0;
  bool straight = true;
  for (int v = 0; v < a.vectors; ++v) {
    const PixelStore* s = a.out.stores + a.stores[v].first;
    for (const PixelStore* const end = s + a.stores[v].count; s != end && s->image < a.out.images; ++s) {
      stores[count++] = {v, s->lanes, s->y, s->residual, s->from};
      straight &= s->straight;
    }
  }
  if (a.out.residual) {
    straight ? spread_stores<V, T, true, true>(a, stores, count) : spread_stores<V, T, false, true>(a, stores, count);
  } else {
    straight ? spread_stores<V, T, true, false>(a, stores, count) : spread_stores<V, T, false, false>(a, stores, count);
  }
}

constexpr int kSpreadFilters = 4;  // at a time, where vectors go from register to register

// Where each vector is one store at most, as it is, and filters come in fours.
template <class V, bool kResidual, bool kLimited>
inline void spread_straight(const SpreadArgs& a) {
  constexpr int N = V::kLanes;
  const Output& o = a.out;
  const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
  const int64_t y_stride = o.y_stride, residual_stride = o.residual_stride, sums_stride = a.sums_stride;
  struct {
    const float *sums, *residual;
    float* y;
    typename V::Lanes lanes;
    int count;
  } some[kMaxSpan / N];
  int vectors = 0;
  for (int v = 0; v < a.vectors; ++v) {
    const PixelStore& s = o.stores[a.stores[v].first];
    if (a.stores[v].count == 0 || s.image >= o.images) continue;
    some[vectors++] = {a.sums + v * N * sums_stride, kResidual ? o.residual + s.residual : nullptr, o.y + s.y,
                       V::lanes(s.lanes), s.count};
  }
  for (int first = 0; first < a.filters; first += kSpreadFilters) {
    for (int v = 0; v < vectors; ++v) {
      auto& at = some[v];
      const auto put = [=](auto load, auto store) __attribute__((always_inline)) {
        typename V::Reg r[kSpreadFilters];
        V::transpose(at.sums + first, sums_stride, r);
        const float* residual = at.residual;
        float* y = at.y;
        const auto lanes = at.lanes;
#pragma GCC unroll 4
        for (int f = 0; f < kSpreadFilters; ++f, y += y_stride, residual += kResidual ? residual_stride : 0) {
          if constexpr (kResidual) r[f] = V::add(r[f], load(residual, lanes));
          r[f] = V::max(low, r[f]);
          if constexpr (kLimited) r[f] = V::min(high, r[f]);
          store(y, V::only(r[f], lanes));
        }
      };
      if (at.count == N) {
        put([](const float* p, auto) { return V::load(p); }, [](float* p, auto r) { V::store(p, r); });
      } else {
        V::with_store(at.count,
                      [&](auto store) { put([](const float* p, auto l) { return V::load_lanes(p, l); }, store); });
      }
      at.y += kSpreadFilters * y_stride;
      if constexpr (kResidual) at.residual += kSpreadFilters * residual_stride;
    }
  }
}

template <class V>
inline bool is_straight(const SpreadArgs& a) {
  bool straight = a.filters % kSpreadFilters == 0 && a.out.epilogue.activation == Activation::kClamp;
  for (int v = 0; v < a.vectors; ++v) {
    straight =
        straight && (a.stores[v].count == 0 || (a.stores[v].count == 1 && a.out.stores[a.stores[v].first].straight));
  }
  return straight;
}

template <class V>
inline void spread_by_vectors(const SpreadArgs& a) {
  constexpr int N = V::kLanes;
  const Output& o = a.out;
  if (is_straight<V>(a)) {
    const bool limited = o.epilogue.high < __builtin_inff();
    if (o.residual) return limited ? spread_straight<V, true, true>(a) : spread_straight<V, true, false>(a);
    return limited ? spread_straight<V, false, true>(a) : spread_straight<V, false, false>(a);
  }
  const bool curve = o.epilogue.activation != Activation::kClamp, limited = o.epilogue.high < __builtin_inff();
  const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
  for (int first = 0; first < a.filters; first += N) {
    alignas(64) float block[kMaxSpan / N][N][N];
    for (int v = 0; v < a.vectors; ++v) V::transpose(a.sums + first + v * N * a.sums_stride, a.sums_stride, block[v]);
    const int filters = a.filters - first < N ? a.filters - first : N;
    for (int f = 0; f < filters; ++f) {
      float* const y = o.y + (first + f) * o.y_stride;
      const float* const residual = o.residual ? o.residual + (first + f) * o.residual_stride : nullptr;
      for (int v = 0; v < a.vectors; ++v) {
        const PixelStore* s = o.stores + a.stores[v].first;
        for (const PixelStore* const end = s + a.stores[v].count; s != end && s->image < o.images; ++s) {
          if (!is_whole<V>(*s) || curve) {
            Output one = o;
            one.y = y;
            one.residual = residual;
            put_all<V>(block[v][f], 0, 1, s, 1, one);
            continue;
          }
          auto r = V::load(block[v][f]);
          const auto lanes = V::lanes(s->lanes);
          if (!s->straight) r = V::permute(r, V::index(s->from));
          if (residual) r = V::add(r, V::load_lanes(residual + s->residual, lanes));
          r = V::max(low, r);
          if (limited) r = V::min(high, r);
          V::store(y + s->y, V::only(r, lanes));
        }
      }
    }
  }
}

// T: of y and the residual.
template <class V, class T = float>
void spread(const SpreadArgs& a) {
  if constexpr (V::kMasks) {
    spread_by_lanes<V, T>(a);
  } else {
    spread_by_vectors<V>(a);
  }
}

// Rows of the tables of struct GemmCompact.
template <class V, int W, int NV, int... I>
constexpr void fill_filters(FiltersKernel (&row)[kMaxPixels], std::integer_sequence<int, I...>) {
  ((row[I] = &filters<V, W, NV, I + 1>), ...);
}
template <int N>
using upto = std::make_integer_sequence<int, N>;
