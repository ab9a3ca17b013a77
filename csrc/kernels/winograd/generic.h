// The transforms over a type Vec of vectors and a function deinterleave. Included by the ISA files inside their
// anonymous namespaces.

// B' d, along one axis.
inline void to_points(const Vec (&d)[6], Vec (&t)[6]) {
  const Vec s = Vec::set1(static_cast<float>(-points::kS)), a = Vec::set1(static_cast<float>(points::kA)),
            b = Vec::set1(static_cast<float>(points::kB)), a2 = Vec::set1(static_cast<float>(-points::kA2)),
            b2 = Vec::set1(static_cast<float>(-points::kB2));
  const Vec even_a = fma(b2, d[2], d[4]), odd_a = a * fma(b2, d[1], d[3]);
  const Vec even_b = fma(a2, d[2], d[4]), odd_b = b * fma(a2, d[1], d[3]);
  t[0] = fma(s, d[2], d[0] + d[4]);
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = fma(s, d[3], d[1] + d[5]);
}

// A' m, along one axis.
inline void from_points(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec a = Vec::set1(static_cast<float>(points::kA)), b = Vec::set1(static_cast<float>(points::kB)),
            a2 = Vec::set1(static_cast<float>(points::kA2)), b2 = Vec::set1(static_cast<float>(points::kB2)),
            a3 = Vec::set1(static_cast<float>(points::kA2 * points::kA)),
            b3 = Vec::set1(static_cast<float>(points::kB2 * points::kB));
  const Vec plus_a = m[1] + m[2], minus_a = m[1] - m[2], plus_b = m[3] + m[4], minus_b = m[3] - m[4];
  y[0] = m[0] + (plus_a + plus_b);
  y[1] = fma(a, minus_a, b * minus_b);
  y[2] = fma(a2, plus_a, b2 * plus_b);
  y[3] = fma(a3, minus_a, fma(b3, minus_b, m[5]));
}

// Down the columns first, which are vectors as they lie in x and which tiles side by side share. T: of x.
template <class T>
void transform_in(const WinogradIn& a) {
  constexpr int L = Vec::kWidth, kColumns = 4 * L + 8;
  // Rows above and below the plane are this one.
  alignas(64) static constexpr T kZeros[kColumns + L] = {};
  alignas(64) float t[6][kColumns + L];
  // Columns beside the plane stay zero.
  const int left = a.column < 0 ? static_cast<int>(-a.column) : 0;
  const int64_t there = a.width - a.column, wanted = 4 * a.tiles + 2;
  const int right = static_cast<int>(there < wanted ? there : wanted);
  for (auto& row : t) {
    for (int i = 0; i < kColumns; i += L) Vec::zero().store(row + i);
  }
  const T* row[6];
  int64_t stride[6];
  for (int i = 0; i < 6; ++i) {
    const int64_t r = a.row + i;
    const bool inside = 0 <= r && r < a.height;
    row[i] = inside ? static_cast<const T*>(a.x) + r * a.pitch + a.column : kZeros;
    stride[i] = inside ? a.plane_stride : 0;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* at[6];
    for (int i = 0; i < 6; ++i) at[i] = row[i] + a.channel[c] * stride[i];
    const auto columns = [&](int i, auto load) {
      Vec d[6], r[6];
      for (int k = 0; k < 6; ++k) d[k] = load(at[k] + i);
      to_points(d, r);
      for (int k = 0; k < 6; ++k) r[k].store(t[k] + i);
    };
    int i = left;
    for (; i + L <= right; i += L) columns(i, [](const T* p) { return Vec::load(p); });
    if (i < right) columns(i, [n = right - i](const T* p) { return Vec::load_n(p, n); });
    float* v = a.v + c * a.channel_stride;
    for (int k = 0; k < 6; ++k, v += 6 * a.place_stride) {
      Vec d[6], r[6];
      deinterleave(t[k], d);
      to_points(d, r);
      if (a.tiles == L) {
        for (int j = 0; j < 6; ++j) r[j].store(v + j * a.place_stride);
      } else {
        for (int j = 0; j < 6; ++j) r[j].store_n(v + j * a.place_stride, a.tiles);
      }
    }
  }
}

void transform_out(const WinogradOut& a) {
  for (int tile = 0; tile < a.tiles; ++tile) {
    for (int f = 0; f < a.filters; f += Vec::kWidth) {
      const float* m = a.m + tile * a.tile_stride + f;
      const Vec bias = Vec::load(a.bias + f);
      Vec t[4][6];
      for (int j = 0; j < 6; ++j) {
        Vec d[6], r[4];
        for (int i = 0; i < 6; ++i) d[i] = Vec::load(m + (6 * i + j) * a.place_stride);
        from_points(d, r);
        for (int i = 0; i < 4; ++i) t[i][j] = r[i];
      }
      for (int i = 0; i < 4; ++i) {
        Vec r[4];
        from_points(t[i], r);
        float* const y = a.y + (i * a.row_stride + tile * 4) * a.pixel_stride + f;
        for (int j = 0; j < 4; ++j) (r[j] + bias).store(y + j * a.pixel_stride);
      }
    }
  }
}
