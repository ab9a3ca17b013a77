// pad_copy over a type V of vectors, included by the ISA files inside their anonymous namespaces.

// By value: the compiler must take the stores for writes to what a reference refers to.
template <class V>
void pad_copy_f32(const PadCopyArgs a) {
  constexpr int64_t kLanes = V::kLanes;
  // Everything is written in ascending order by whole vectors: what one write spills, a later one overwrites.
  float* d = a.dst;
  const auto zero_until = [&](float* to) {
    for (; d < to; d += kLanes) {
      V::store(d, V::zero());
      asm("" : "+r"(d));  // mostly one store: no call of memset
    }
    d = to;
  };
  const int64_t full = a.cols / kLanes, rest = a.cols % kLanes;
  const auto some = V::first(rest);
  // Of every other column, the last that may be read is the last that is wanted.
  const auto all = V::first(kLanes), all_but_one = V::first(kLanes - 1);
  const auto low = V::first(2 * rest - 1), high = V::first(2 * rest - 1 - kLanes);
  for (int64_t n = 0; n < a.images; ++n) {
    const float* src = a.src + n * a.image_stride;
    zero_until(a.dst + (n * a.image_rows + a.lead_rows) * a.pitch + a.lead_cols);
    for (int64_t r = 0; r < a.rows; ++r, src += a.row_stride) {
      float* const next = d + a.pitch;
      if (a.col_stride == 1) {
        const float* s = src;
        for (int64_t v = 0; v < full; ++v, d += kLanes, s += kLanes) V::store(d, V::load(s));
        if (rest) V::store(d, V::load(s, some)), d += kLanes;
      } else if (a.col_stride == 2) {
        const float* s = src;
        for (int64_t v = 0; v < full; ++v, d += kLanes, s += 2 * kLanes) V::store(d, V::load_even(s, all, all_but_one));
        if (rest) V::store(d, V::load_even(s, low, high)), d += kLanes;
      } else if (a.col_stride == 4) {
        const float* s = src;
        for (int64_t v = 0; v < full; ++v, d += kLanes, s += 4 * kLanes) V::store(d, V::load_fourth(s));
        for (int64_t c = full * kLanes; c < a.cols; ++c) *d++ = src[c * 4];
      } else {
        for (int64_t c = 0; c < a.cols; ++c) *d++ = src[c * a.col_stride];
      }
      zero_until(next);
    }
  }
  zero_until(a.dst + a.images * a.image_rows * a.pitch + a.tail);
}
