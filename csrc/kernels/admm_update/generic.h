// The kernels over a vector type; an ISA file includes this inside `namespace <isa>` after the vector type.
// No include guard and no standard templates: what is here is compiled once per instruction set, with internal linkage.

// Squares are added in f32 over a piece of a row, and the piece's sums in f64. All in f64 would take three times the
// instructions, and be slower than the third-level cache; a piece's lane adds 16 squares, so the relative error of a
// sum is at most 16 * 2^-24, and as the errors have both signs, far less.
constexpr int kLanes = 16;
constexpr int64_t kPiece = 256;

struct Run {
  static constexpr int kVecs = kLanes / Vec::kWidth;
  Vec sums[5][kVecs];

  void clear() {
    for (auto& sum : sums) {
      for (Vec& v : sum) v = Vec::zero();
    }
  }
  void add(int sum, int vec, Vec x) { sums[sum][vec] = fma(x, x, sums[sum][vec]); }
  void flush(Sums* totals) const {
    for (int s = 0; s < 5; ++s) {
      for (const Vec& v : sums[s]) totals[s].add(v);
    }
  }
};

inline void update_vec(Vec w, Vec z, Vec u, Mask on, int vec, Vec& znew, Vec& unew, Run& run) {
  const Vec v = w + u;
  znew = where(on, v);
  unew = v - znew;
  run.add(0, vec, w - znew);
  run.add(1, vec, znew - z);
  run.add(2, vec, w);
  run.add(3, vec, znew);
  run.add(4, vec, unew);
}

template <class T, bool kMask>
void update_of(const AdmmUpdate& t) {
  Sums totals[5];
  for (int i = 0; i < 5; ++i) totals[i] = Sums::load(t.sums[i]);
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* w = static_cast<const T*>(t.w) + r * t.w_stride;
    float* z = t.z + r * t.z_stride;
    float* u = t.u + r * t.u_stride;
    const uint8_t* keep = t.keep + r * t.keep_stride;
    const uint8_t* mask = kMask ? t.mask + r * t.mask_stride : nullptr;
    Vec znew, unew;
    for (int64_t begin = 0; begin < t.cols; begin += kPiece) {
      const int64_t end = t.cols - begin < kPiece ? t.cols : begin + kPiece;
      Run run;
      run.clear();
      int64_t c = begin;
      for (; c + kLanes <= end; c += kLanes) {
        for (int i = 0; i < Run::kVecs; ++i) {
          const int64_t at = c + i * Vec::kWidth;
          Mask on = Mask::load(keep + at);
          if constexpr (kMask) on = on & Mask::load(mask + at);
          update_vec(Vec::load(w + at), Vec::load(z + at), Vec::load(u + at), on, i, znew, unew, run);
          znew.store(z + at);
          unew.store(u + at);
        }
      }
      // The lanes past the end are zeros in every operand, so they add +0 to every sum.
      for (int i = 0; c < end; ++i, c += Vec::kWidth) {
        const int n = end - c < Vec::kWidth ? static_cast<int>(end - c) : Vec::kWidth;
        Mask on = Mask::load_n(keep + c, n);
        if constexpr (kMask) on = on & Mask::load_n(mask + c, n);
        update_vec(Vec::load_n(w + c, n), Vec::load_n(z + c, n), Vec::load_n(u + c, n), on, i, znew, unew, run);
        znew.store_n(z + c, n);
        unew.store_n(u + c, n);
      }
      run.flush(totals);
    }
  }
  for (int i = 0; i < 5; ++i) totals[i].store(t.sums[i]);
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
