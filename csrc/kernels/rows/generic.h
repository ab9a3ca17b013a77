// The kernels over the vectors of a namespace of csrc/simd, which the ISA files name before they include this inside
// their anonymous namespaces.

[[gnu::noinline]] Vec curve(Vec v, const Epilogue& epilogue) {
  return activate(v, epilogue);
}

template <RowOp Op, class X, class Y, bool Curve>
void run_rows(const RowsArgs a) {
  constexpr int kW = Vec::kWidth;
  using P = const X*;
  const Vec low = Vec::set1(a.epilogue.low), high = Vec::set1(a.epilogue.high);
  for (int64_t r = 0; r < a.rows; ++r) {
    const X* x = static_cast<P>(a.x) + r * a.x_stride;
    const X* b = static_cast<P>(a.b) + r * a.b_stride;
    Y* y = static_cast<Y*>(a.y) + r * a.y_stride;
    const float *scale = a.scale + r * a.scale_stride, *shift = a.shift + r * a.scale_stride;
    Vec row_scale = Vec::zero(), row_shift = Vec::zero();
    if constexpr (Op == RowOp::kGate) row_scale = Vec::set1(scalar::to_float(*b));
    if constexpr (Op == RowOp::kAffine) row_scale = Vec::set1(*scale), row_shift = Vec::set1(*shift);
    const auto finish = [&](Vec v, auto load, int64_t i) {
      if constexpr (Op == RowOp::kAdd) v = v + load(b + i);
      if constexpr (Op == RowOp::kMultiply) v = v * load(b + i);
      if constexpr (Op == RowOp::kGate) v = v * row_scale;
      if constexpr (Op == RowOp::kAffine) v = fma(v, row_scale, row_shift);
      if constexpr (Op == RowOp::kAffines) v = fma(v, load(scale + i), load(shift + i));
      if constexpr (Curve) return curve(v, a.epilogue);
      return clamp(v, low, high);
    };
    int64_t i = 0;
    for (; i + kW <= a.cols; i += kW) {
      const auto load = [](const auto* p) { return Vec::load(p); };
      finish(load(x + i), load, i).store(y + i);
    }
    if (const int n = static_cast<int>(a.cols - i); n > 0) {
      const auto load = [n](const auto* p) { return Vec::load_n(p, n); };
      finish(load(x + i), load, i).store_n(y + i, n);
    }
  }
}

template <RowOp Op, class X, class Y>
void rows(const RowsArgs& a) {
  if (a.epilogue.activation != Activation::kClamp) {
    run_rows<Op, X, Y, true>(a);
  } else {
    run_rows<Op, X, Y, false>(a);
  }
}

// The last vector of a row overlaps the one before; rows shorter than a vector take half of one.
template <class T, int kW>
void move_rows(const RowsArgs& a) {
  if constexpr (kW > 1) {
    if (a.cols < kW) return move_rows<T, kW / 2>(a);
  }
  using V [[gnu::vector_size(kW * sizeof(T)), gnu::aligned(alignof(T)), gnu::may_alias]] = T;
  const int64_t whole = a.cols / kW * kW, last = a.cols - kW;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  for (int64_t r = 0; r < a.rows; ++r, x += a.x_stride, y += a.y_stride) {
    const auto move = [&](int64_t i) { *reinterpret_cast<V*>(y + i) = *reinterpret_cast<const V*>(x + i); };
    for (int64_t i = 0; i < whole; i += kW) move(i);
    if (whole < a.cols) move(last);
  }
}

template <class X, class Y>
void transpose_rows(const RowsArgs& a) {
  constexpr int kW = Vec::kWidth;
  for (int64_t r = 0; r < a.rows; r += kW) {
    const int height = static_cast<int>(a.rows - r < kW ? a.rows - r : kW);
    for (int64_t i = 0; i < a.cols; i += kW) {
      const int width = static_cast<int>(a.cols - i < kW ? a.cols - i : kW);
      const X* x = static_cast<const X*>(a.x) + r * a.x_stride + i;
      Y* y = static_cast<Y*>(a.y) + i * a.y_stride + r;
      Vec v[kW];
      if (height == kW && width == kW) {
#pragma GCC unroll 16
        for (int k = 0; k < kW; ++k) v[k] = Vec::load(x + k * a.x_stride);
        transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < kW; ++k) v[k].store(y + k * a.y_stride);
      } else {
#pragma GCC unroll 16
        for (int k = 0; k < kW; ++k) v[k] = k < height ? Vec::load_n(x + k * a.x_stride, width) : Vec::zero();
        transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < kW; ++k) {
          if (k < width) v[k].store_n(y + k * a.y_stride, height);
        }
      }
    }
  }
}

template <class X, class Y>
void split_triples(const RowsArgs& a) {
  constexpr int kW = Vec::kWidth;
  const X* x = static_cast<const X*>(a.x);
  Y* y = static_cast<Y*>(a.y);
  int64_t i = 0;
  for (; i + kW <= a.cols; i += kW, x += 3 * kW) {
    Vec v[3];
    load_triples(x, v);
    for (int j = 0; j < 3; ++j) v[j].store(y + j * a.y_stride + i);
  }
  for (; i < a.cols; ++i, x += 3) {
    for (int j = 0; j < 3; ++j) scalar::from_float(scalar::to_float(x[j]), y[j * a.y_stride + i]);
  }
}

template <class X, class Y>
constexpr void fill_copies(RowsKernels& k, int x, int y) {
  k.rows[0][x][y] = &rows<RowOp::kCopy, X, Y>;
  k.transpose[x][y] = &transpose_rows<X, Y>;
  k.split_triples[x][y] = &split_triples<X, Y>;
}
template <class X, class Y>
constexpr void fill(RowsKernels& k, int x, int y) {
  fill_copies<X, Y>(k, x, y);
  k.rows[1][x][y] = &rows<RowOp::kAdd, X, Y>;
  k.rows[2][x][y] = &rows<RowOp::kMultiply, X, Y>;
  k.rows[3][x][y] = &rows<RowOp::kGate, X, Y>;
  k.rows[4][x][y] = &rows<RowOp::kAffine, X, Y>;
  k.rows[5][x][y] = &rows<RowOp::kAffines, X, Y>;
}
constexpr RowsKernels make(const char* isa) {
  RowsKernels k{.isa = isa, .lanes = Vec::kWidth, .rows = {}, .move = {}, .transpose = {}, .split_triples = {}};
  k.move[0] = &move_rows<uint32_t, Vec::kWidth>;
  k.move[1] = &move_rows<uint16_t, Vec::kWidth>;
  fill<float, float>(k, 0, 0);
  fill<float, Bf16>(k, 0, 1);
  fill<Bf16, float>(k, 1, 0);
  fill<Bf16, Bf16>(k, 1, 1);
  fill_copies<float, F16>(k, 0, 2);
  fill_copies<Bf16, F16>(k, 1, 2);
  fill_copies<F16, float>(k, 2, 0);
  fill_copies<F16, Bf16>(k, 2, 1);
  return k;
}
