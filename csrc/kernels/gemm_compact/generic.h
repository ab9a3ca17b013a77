// The two micro-kernels over a type V of vectors. Included by the ISA files inside their anonymous namespaces, so that
// nothing compiled for one instruction set can be called by another.

template <class V, int MR, int NR, bool Gather>
void pixels(const PixelsArgs& a) {
  typename V::Reg acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) acc[m][v] = V::broadcast(a.bias + m);
  }
  const float* base[NR];
  typename V::Index index[NR];
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    base[v] = a.x + a.vectors[v].offset;
    if constexpr (Gather) index[v] = V::load_index(a.vectors[v].lane);
  }
  const float* w = a.w;
  const Tap* const end = a.taps + a.n_taps;
  for (const Tap* t = a.taps; t != end; ++t, w += a.w_stride) {
    // Scalar units are idle here, so the offset is worked out per tile instead of kept per size of map.
    const int64_t offset = t->channel * a.channel_stride + a.position_offset[t->position];
    typename V::Reg px[NR];
#pragma GCC unroll 8
    for (int v = 0; v < NR; ++v) {
      if constexpr (Gather) {
        px[v] = V::gather(base[v] + offset, index[v]);
      } else {
        px[v] = V::load(base[v] + offset);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::Reg wm = V::broadcast(w + m);
#pragma GCC unroll 8
      for (int v = 0; v < NR; ++v) acc[m][v] = V::fma(wm, px[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NR; ++v) {
    const PixelSegment* s = a.segments + a.vectors[v].first_segment;
    for (int i = 0; i < a.vectors[v].segments && s->image < a.images; ++i, ++s) {
      float* y = a.y + s->y_offset;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        if (m >= a.filters) break;
        if (s->lanes == V::kAllLanes) {
          V::store(y + m * a.y_stride, acc[m][v]);
        } else {
          V::store_lanes(y + m * a.y_stride, s->lanes, acc[m][v]);
        }
      }
    }
  }
}

// P vectors of filters [first, first + lanes) to y: as rows where filters are contiguous (linear), else transposed.
template <class V, int P>
inline void store_filters(const FiltersArgs& a, int first, const typename V::Reg (&r)[P]) {
  const int n = a.filters - first < V::kLanes ? a.filters - first : V::kLanes;
  if (n == V::kLanes && a.y_stride == 1) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) V::store(a.y + a.out[p] + first, r[p]);
    return;
  }
  if constexpr (V::template kTransposes<P>) {
    if (n == V::kLanes && a.out[P - 1] - a.out[0] == P - 1) {
      V::store_transposed(a.y + a.out[0] + first * a.y_stride, a.y_stride, r);
      return;
    }
  }
  alignas(64) float tile[P][V::kLanes];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) V::store(tile[p], r[p]);
  for (int p = 0; p < P; ++p) {
    float* y = a.y + a.out[p] + first * a.y_stride;
    for (int f = 0; f < n; ++f) y[f * a.y_stride] = tile[p][f];
  }
}

// W is the width of a panel, kPer vectors.
template <class V, int W, int NV, int P>
void filters(const FiltersArgs& a) {
  constexpr int kPer = W / V::kLanes, kVectors = kPer * NV;
  typename V::Reg acc[P][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[p][v] = V::load(a.bias + v * V::kLanes);
  }
  const int64_t panel_stride = a.n_taps * W;
  const Tap* const end = a.taps + a.n_taps;
  const auto run = [&](auto place) {
    const float* w = a.w;
    for (const Tap* t = a.taps; t != end; ++t, w += W) {
      const int64_t offset = t->channel * a.channel_stride + a.position_offset[t->position];
      typename V::Reg wv[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) wv[v] = V::load(w + (v / kPer) * panel_stride + (v % kPer) * V::kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const typename V::Reg xp = V::broadcast(place(p) + offset);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[p][v] = V::fma(xp, wv[v], acc[p][v]);
      }
    }
  };
  if (a.pixel[P - 1] - a.pixel[0] == P - 1) {
    // Pixels of one row need one pointer, not more than there are registers.
    const float* const px = a.x + a.pixel[0];
    run([=](int p) { return px + p; });
  } else {
    const float* px[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) px[p] = a.x + a.pixel[p];
    run([&](int p) { return px[p]; });
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    if (v * V::kLanes >= a.filters) break;
    typename V::Reg column[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) column[p] = acc[p][v];
    store_filters<V, P>(a, v * V::kLanes, column);
  }
}

// Rows of the tables of struct GemmCompact.
template <class V, int MR, bool Gather, int... I>
constexpr void fill_pixels(PixelsKernel (&row)[kMaxVectors], std::integer_sequence<int, I...>) {
  ((row[I] = &pixels<V, MR, I + 1, Gather>), ...);
}
template <class V, int W, int NV, int... I>
constexpr void fill_filters(FiltersKernel (&row)[kMaxPixels], std::integer_sequence<int, I...>) {
  ((row[I] = &filters<V, W, NV, I + 1>), ...);
}
template <int N>
using upto = std::make_integer_sequence<int, N>;
