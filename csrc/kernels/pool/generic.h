// The kernels over the vectors of a namespace of csrc/simd, which the ISA files name before they include this inside
// their anonymous namespaces.

template <bool Max>
Vec joined(Vec x, Vec y) {
  if constexpr (Max) return max_or_nan(x, y);
  return x + y;
}

template <bool Max>
constexpr float kNothing = Max ? -__builtin_inff() : 0.0f;

// One output row from the row of column results, whose element 0 is column -column_lead.
template <bool Max, class T, class Load>
void pool_columns(const PoolArgs& a, T* y, float row_divisor, const Load& load) {
  constexpr int kW = Vec::kWidth;
  for (int64_t ox = 0; ox < a.out_width; ox += kW) {
    const float* p = a.buffer + ox * a.column_stride;
    Vec v = load(p);
    for (int64_t j = 1; j < a.kernel_columns; ++j) v = joined<Max>(v, load(p + j * a.column_step));
    const int64_t left = a.out_width - ox;
    const int n = static_cast<int>(left < kW ? left : kW);
    if constexpr (!Max) {
      const float* d = a.column_divisors + ox;
      v = over(v, (n == kW ? Vec::load(d) : Vec::load_n(d, n)) * Vec::set1(row_divisor));
    }
    if (n == kW) {
      v.store(y + ox);
    } else {
      v.store_n(y + ox, n);
    }
  }
}

// Every other element of a row: windows of one.
template <class T>
void pick_even(const PoolArgs& a, const T* x, T* y) {
  constexpr int kW = Vec::kWidth;
  const auto some = [](const T* p, int64_t n) {
    return n >= kW ? Vec::load(p) : Vec::load_n(p, static_cast<int>(n > 0 ? n : 0));
  };
  for (int64_t ox = 0; ox < a.out_width; ox += kW) {
    const T* const p = x + 2 * ox;
    const int64_t inside = a.width - 2 * ox, left = a.out_width - ox;
    const Vec v = even(some(p, inside), some(p + kW, inside - kW));
    if (left >= kW) {
      v.store(y + ox);
    } else {
      v.store_n(y + ox, static_cast<int>(left));
    }
  }
}

template <bool Max, class T>
void pool_windows(const PoolArgs& a) {
  constexpr int kW = Vec::kWidth;
  if (Max && a.kernel_columns == 1 && a.column_stride == 2 && a.column_lead == 0 && a.kernel_rows == 1) {
    for (int64_t oy = 0; oy < a.out_height; ++oy) {
      pick_even(a, static_cast<const T*>(a.x) + a.rows[oy].first * a.x_pitch, static_cast<T*>(a.y) + oy * a.y_pitch);
    }
    return;
  }
  for (int64_t i = 0; i < a.buffer_size; ++i) a.buffer[i] = kNothing<Max>;
  float* const row = a.buffer + a.column_lead;
  for (int64_t oy = 0; oy < a.out_height; ++oy) {
    const PoolWindow w = a.rows[oy];
    const T* x = static_cast<const T*>(a.x) + w.first * a.x_pitch;
    const int64_t step = a.row_step * a.x_pitch;
    T* y = static_cast<T*>(a.y) + oy * a.y_pitch;
    for (int64_t i = 0; i < a.width; i += kW) {
      const int64_t left = a.width - i;
      const int n = static_cast<int>(left < kW ? left : kW);
      Vec v = Vec::set1(kNothing<Max>);
      if (n == kW) {
        for (int r = 0; r < w.count; ++r) v = joined<Max>(v, Vec::load(x + r * step + i));
        v.store(row + i);
      } else {
        for (int r = 0; r < w.count; ++r) v = joined<Max>(v, Vec::load_n(x + r * step + i, n));
        v.store_n(row + i, n);
      }
    }
    if (a.column_stride == 1) {
      pool_columns<Max>(a, y, a.row_divisors[oy], [](const float* p) { return Vec::load(p); });
    } else if (a.column_stride == 2) {
      pool_columns<Max>(a, y, a.row_divisors[oy], [](const float* p) { return load_even(p); });
    } else if (a.column_stride > 0) {
      pool_columns<Max>(a, y, a.row_divisors[oy], [&](const float* p) { return load_strided(p, a.column_stride); });
    } else {
      for (int64_t ox = 0; ox < a.out_width; ++ox) {
        const PoolWindow c = a.columns[ox];
        float v = kNothing<Max>;
        for (int j = 0; j < c.count; ++j) {
          v = Max ? scalar::max_or_nan(v, row[c.first + j]) : v + row[c.first + j];
        }
        scalar::from_float(Max ? v : v / (a.row_divisors[oy] * a.column_divisors[ox]), y[ox]);
      }
    }
  }
}

template <class T>
float plane_sum(const T* x, int64_t n) {
  constexpr int kW = Vec::kWidth;
  Vec v[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    for (int k = 0; k < 4; ++k) v[k] = v[k] + Vec::load(x + i + k * kW);
  }
  for (int k = 0; i < n; i += kW, ++k) {
    const int64_t left = n - i;
    v[k] = v[k] + (left < kW ? Vec::load_n(x + i, static_cast<int>(left)) : Vec::load(x + i));
  }
  return sum((v[0] + v[1]) + (v[2] + v[3]));
}

template <class T>
float plane_max(const T* x, int64_t height, int64_t width, int64_t pitch) {
  constexpr int kW = Vec::kWidth;
  float m = kNothing<true>;
  for (int64_t i = 0; i < width; i += kW) {
    const int n = static_cast<int>(width - i < kW ? width - i : kW);
    Vec v = Vec::set1(m);
    for (int64_t r = 0; r < height; ++r) v = max_or_nan(v, Vec::load_n(x + r * pitch + i, n));
    float lanes[kW];
    v.store(lanes);
    for (int k = 0; k < n; ++k) m = scalar::max_or_nan(m, lanes[k]);
  }
  return m;
}

template <bool Max, class T>
void pool_planes(const PoolPlanesArgs& a) {
  const int64_t flat = (a.height - 1) * a.pitch + a.width;
  const float size = static_cast<float>(a.height * a.width);
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* x = static_cast<const T*>(a.x) + c * a.channel_stride;
    T* y = static_cast<T*>(a.y) + c * a.y_stride;
    scalar::from_float(Max ? plane_max(x, a.height, a.width, a.pitch) : plane_sum(x, flat) / size, *y);
  }
}

constexpr PoolKernels make(const char* isa) {
  return {.isa = isa,
          .windows = {{&pool_windows<true, float>, &pool_windows<true, Bf16>},
                      {&pool_windows<false, float>, &pool_windows<false, Bf16>}},
          .planes = {{&pool_planes<true, float>, &pool_planes<true, Bf16>},
                     {&pool_planes<false, float>, &pool_planes<false, Bf16>}}};
}
