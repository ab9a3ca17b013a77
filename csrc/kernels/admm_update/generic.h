// The kernels over a vector type; an ISA file includes this inside `namespace <isa>` after the vector type.
// No include guard and no standard templates: what is here is compiled once per instruction set, with internal linkage.

inline void update_vec(Vec w, Vec z, Vec u, Mask on, Vec& znew, Vec& unew, Sums* sums) {
  const Vec v = w + u;
  znew = where(on, v);
  unew = v - znew;
  sums[0].add_square(w - znew);
  sums[1].add_square(znew - z);
  sums[2].add_square(w);
  sums[3].add_square(znew);
  sums[4].add_square(unew);
}

template <class T, bool kMask>
void update_of(const AdmmUpdate& t) {
  Sums sums[5];
  for (int i = 0; i < 5; ++i) sums[i] = Sums::load(t.sums[i]);
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* w = static_cast<const T*>(t.w) + r * t.w_stride;
    float* z = t.z + r * t.z_stride;
    float* u = t.u + r * t.u_stride;
    const uint8_t* keep = t.keep + r * t.keep_stride;
    const uint8_t* mask = kMask ? t.mask + r * t.mask_stride : nullptr;
    Vec znew, unew;
    int64_t c = 0;
    for (; c + Vec::kWidth <= t.cols; c += Vec::kWidth) {
      Mask on = Mask::load(keep + c);
      if constexpr (kMask) on = on & Mask::load(mask + c);
      update_vec(Vec::load(w + c), Vec::load(z + c), Vec::load(u + c), on, znew, unew, sums);
      znew.store(z + c);
      unew.store(u + c);
    }
    if (c < t.cols) {
      // The lanes past the end are zeros in every operand, so they add +0 to every sum.
      const int n = static_cast<int>(t.cols - c);
      Mask on = Mask::load_n(keep + c, n);
      if constexpr (kMask) on = on & Mask::load_n(mask + c, n);
      update_vec(Vec::load_n(w + c, n), Vec::load_n(z + c, n), Vec::load_n(u + c, n), on, znew, unew, sums);
      znew.store_n(z + c, n);
      unew.store_n(u + c, n);
    }
  }
  for (int i = 0; i < 5; ++i) sums[i].store(t.sums[i]);
}

template <class T>
void update(const AdmmUpdate& t) {
  t.mask ? update_of<T, true>(t) : update_of<T, false>(t);
}

template <class T>
void penalty(const AdmmPenalty& t) {
  T* g = static_cast<T*>(t.g);
  const T* w = static_cast<const T*>(t.w);
  const Vec rho = Vec::set1(t.rho);
  int64_t c = 0;
  for (; c + Vec::kWidth <= t.n; c += Vec::kWidth) {
    const Vec away = (Vec::load(w + c) - Vec::load(t.z + c)) + Vec::load(t.u + c);
    (Vec::load(g + c) + rho * away).store(g + c);
  }
  if (c < t.n) {
    const int n = static_cast<int>(t.n - c);
    const Vec away = (Vec::load_n(w + c, n) - Vec::load_n(t.z + c, n)) + Vec::load_n(t.u + c, n);
    (Vec::load_n(g + c, n) + rho * away).store_n(g + c, n);
  }
}
