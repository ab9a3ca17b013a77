// The kernels over the vectors of a namespace of csrc/simd, which the ISA files name before they include this inside
// their anonymous namespaces.

[[gnu::noinline]] Vec curve(Vec v, const Epilogue& epilogue) {
  return activate(v, epilogue);
}

inline Vec finished(Vec v, const Epilogue& e) {
  if (e.activation != Activation::kClamp) return curve(v, e);
  return clamp(v, Vec::set1(e.low), Vec::set1(e.high));
}

template <int S, class T>
Vec load_step(const T* p) {
  if constexpr (S == 1) return Vec::load(p);
  return load_even(p);
}

// Q rows of outputs from row oy on.
template <class T, int K, int S, int Q>
inline void square_rows(const DepthwiseArgs& a, int64_t oy) {
  constexpr int kW = Vec::kWidth, kRows = (Q - 1) * S + K;
  const T* x = static_cast<const T*>(a.x) + oy * S * a.x_pitch;
  T* y = static_cast<T*>(a.y) + oy * a.y_pitch;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + oy * a.residual_pitch : nullptr;
  for (int64_t ox = 0; ox < a.out_width; ox += kW) {
    Vec sums[Q];
#pragma GCC unroll 7
    for (int q = 0; q < Q; ++q) sums[q] = Vec::set1(a.bias);
#pragma GCC unroll 7
    for (int kx = 0; kx < K; ++kx) {
      const T* column = x + ox * S + kx;
#pragma GCC unroll 19
      for (int r = 0; r < kRows; ++r) {
        const Vec v = load_step<S>(column + r * a.x_pitch);
#pragma GCC unroll 7
        for (int q = 0; q < Q; ++q) {
          const int ky = r - q * S;
          if (ky >= 0 && ky < K) sums[q] = fma(v, Vec::set1(a.w[ky * K + kx]), sums[q]);
        }
      }
    }
    const int64_t left = a.out_width - ox;
    const int n = static_cast<int>(left < kW ? left : kW);
#pragma GCC unroll 7
    for (int q = 0; q < Q; ++q) {
      Vec v = sums[q];
      if (residual) v = v + Vec::load_n(residual + q * a.residual_pitch + ox, n);
      v = finished(v, a.epilogue);
      if (n == kW) {
        v.store(y + q * a.y_pitch + ox);
      } else {
        v.store_n(y + q * a.y_pitch + ox, n);
      }
    }
  }
}

template <class T, int K, int S>
void square(const DepthwiseArgs& a) {
  int64_t oy = 0;
  for (; oy + 7 <= a.out_height; oy += 7) square_rows<T, K, S, 7>(a, oy);
  for (; oy + 4 <= a.out_height; oy += 4) square_rows<T, K, S, 4>(a, oy);
  if (oy + 2 <= a.out_height) square_rows<T, K, S, 2>(a, oy), oy += 2;
  if (oy < a.out_height) square_rows<T, K, S, 1>(a, oy);
}

// R vectors at a time; load(x, vector) gives the pixels of its lanes.
template <class T, int R, class Load>
inline void listed_vectors(const DepthwiseArgs& a, const DepthwiseVector* vectors, const Load& load) {
  Vec sums[R];
  const T* x[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sums[r] = Vec::set1(a.bias);
    x[r] = static_cast<const T*>(a.x) + vectors[r].x_offset;
  }
  for (int64_t t = 0; t < a.n_taps; ++t) {
    const Vec w = Vec::set1(a.w[t]);
    const int64_t offset = a.offsets[t];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = fma(load(x[r] + offset, vectors[r]), w, sums[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const DepthwiseSegment* s = a.segments + vectors[r].first_segment;
    for (int i = 0; i < vectors[r].segments; ++i, ++s) {
      Vec v = sums[r];
      if (a.residual) {
        v = v + Vec::load_lanes(static_cast<const T*>(a.residual) + s->residual_offset, s->first, s->last);
      }
      finished(v, a.epilogue).store_lanes(static_cast<T*>(a.y) + s->y_offset, s->first, s->last);
    }
  }
}

template <class T, class Load>
inline void all_vectors(const DepthwiseArgs& a, const Load& load) {
  int64_t i = 0;
  for (; i + 4 <= a.n_vectors; i += 4) listed_vectors<T, 4>(a, a.vectors + i, load);
  for (; i < a.n_vectors; ++i) listed_vectors<T, 1>(a, a.vectors + i, load);
}

template <class T>
void listed(const DepthwiseArgs& a) {
  if (a.stride == 1) {
    all_vectors<T>(a, [](const T* p, const DepthwiseVector&) { return Vec::load(p); });
  } else if (a.stride == 2) {
    all_vectors<T>(a, [](const T* p, const DepthwiseVector&) { return load_even(p); });
  } else {
    all_vectors<T>(a, [&](const T* p, const DepthwiseVector&) { return load_strided(p, a.stride); });
  }
}

template <class T>
void exact(const DepthwiseArgs& a) {
  all_vectors<T>(a, [&](const T* p, const DepthwiseVector& v) {
    float pixels[Vec::kWidth] = {};
    const int lanes = a.segments[v.first_segment].last;
    for (int i = 0; i < lanes; ++i) pixels[i] = scalar::to_float(p[i * a.stride]);
    return Vec::load(pixels);
  });
}

template <class T>
constexpr void fill(Depthwise& k, int dtype) {
  k.square[dtype][0][0] = &square<T, 3, 1>;
  k.square[dtype][0][1] = &square<T, 3, 2>;
  k.square[dtype][1][0] = &square<T, 5, 1>;
  k.square[dtype][1][1] = &square<T, 5, 2>;
  k.square[dtype][2][0] = &square<T, 7, 1>;
  k.square[dtype][2][1] = &square<T, 7, 2>;
  k.listed[dtype] = &listed<T>;
  k.exact[dtype] = &exact<T>;
}
constexpr Depthwise make(const char* isa) {
  Depthwise k{.isa = isa, .lanes = Vec::kWidth, .square = {}, .listed = {}, .exact = {}};
  fill<float>(k, 0);
  fill<Bf16>(k, 1);
  return k;
}
