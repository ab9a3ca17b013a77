// collect and panel over a type V of vectors: see generic.h, behind which it is included.

template <class V, int Window, int NR>
void collect(const CollectArgs& a) {
  const float* base[NR];
  typename V::Index index[NR];
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    base[v] = a.x + a.vectors[v].offset;
    if constexpr (Window > 1) index[v] = V::index(a.vectors[v].lane);
  }
  float* to = a.panel;
  for (const Tap *t = a.taps, *const end = t + a.n_taps; t != end; ++t, to += NR * V::kLanes) {
    const int64_t offset = t->channel * a.channel_stride + a.position_offset[t->position];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) {
      const float* const at = base[v] + offset;
      if constexpr (Window == 1) {
        V::store(to + v * V::kLanes, V::load(at));
      } else if constexpr (Window == 2) {
        V::store(to + v * V::kLanes, V::gather(at, index[v]));
      } else {
        V::store(to + v * V::kLanes, V::gather4(at, index[v]));
      }
    }
  }
}

constexpr int kFloatsPerLine = 16;

// MR filters at a time, and Tail where no more are left: enough sums to keep two units of multiply-adds busy, whatever
// NR. Weights and biases of filters that are not there are read (a packed weight has its biases, and zeros, behind it).
template <class V, int MR, int Tail, int NR>
void panel(const PanelArgs& a) {
  // Found once for all filters: whether a tile goes to y from registers, as it is.
  const Output& o = a.out;
  bool whole = a.last && o.epilogue.activation == Activation::kClamp;
  float* y[NR];
  const float* residual[NR];
  typename V::Lanes lanes[NR];
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    const PixelStore& s = o.stores[a.vectors[v].first_store];
    whole = whole && a.vectors[v].stores == 1 && is_whole<V>(s) && s.image < o.images;
    y[v] = o.y + s.y;
    residual[v] = o.residual ? o.residual + s.residual : nullptr;
    lanes[v] = V::lanes(s.lanes);
  }
  const auto some = [&](auto rows, int first) {
    constexpr int kRows = decltype(rows)::value;
    float* const sums = a.sums + first * NR * V::kLanes;
    typename V::Reg acc[kRows][NR];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) {
        acc[m][v] = a.bias ? V::broadcast(a.bias + first + m) : V::load(sums + (m * NR + v) * V::kLanes);
      }
    }
    const auto run = [&](auto fetch) {
      const float *w = a.w + first, *x = a.panel, *next = a.next;
      for (int64_t t = a.n_taps; t > 0; --t, w += a.w_stride, x += NR * V::kLanes) {
        if constexpr (decltype(fetch)::value) {
          __builtin_prefetch(next);
          next += kFloatsPerLine;
        }
        typename V::Reg px[NR];
#pragma GCC unroll 8
        for (int v = 0; v < NR; ++v) px[v] = V::load(x + v * V::kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const typename V::Reg wm = V::broadcast(w + m);
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) acc[m][v] = V::fma(wm, px[v], acc[m][v]);
        }
      }
    };
    // With the last filters, when nothing else needs the way to memory.
    if (a.next && first + kRows >= a.filters) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
    if (!a.last) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < NR; ++v) V::store(sums + (m * NR + v) * V::kLanes, acc[m][v]);
      }
    } else if (whole && a.filters - first >= kRows) {
      const auto low = V::broadcast(&o.epilogue.low), high = V::broadcast(&o.epilogue.high);
      if (o.residual) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
          for (int v = 0; v < NR; ++v) {
            acc[m][v] = V::add(acc[m][v], V::load(residual[v]));
            residual[v] += o.residual_stride;
          }
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < NR; ++v) {
          V::store(y[v], V::only(V::min(high, V::max(low, acc[m][v])), lanes[v]));
          y[v] += o.y_stride;
        }
      }
    } else {
      Output rest = o;
      rest.y += first * o.y_stride;
      if (o.residual) rest.residual += first * o.residual_stride;
      put_tile<V, kRows, NR>(acc, a.vectors, a.filters - first, rest);
    }
  };
  int first = 0;
  for (; a.filters - first > Tail; first += MR) some(std::integral_constant<int, MR>{}, first);
  if constexpr (Tail > 0) {
    if (first < a.filters) some(std::integral_constant<int, Tail>{}, first);
  }
}

// Rows of the tables of struct GemmCompact.
template <class V, int... I>
constexpr void fill_collect(CollectKernel (&table)[3][kMaxVectors], std::integer_sequence<int, I...>) {
  ((table[0][I] = &collect<V, 1, I + 1>), ...);
  ((table[1][I] = &collect<V, 2, I + 1>), ...);
  ((table[2][I] = &collect<V, 4, I + 1>), ...);
}
