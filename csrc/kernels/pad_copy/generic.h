// pad_copy over a type V of vectors, included by the ISA files inside their anonymous namespaces.

template <class V>
void pad_copy_f32(const PadCopyArgs& a) {
  // Everything is written in ascending order by whole vectors: what one write spills, a later one overwrites.
  float* d = a.dst;
  const auto zero_until = [&](float* to) {
    for (; d < to; d += V::kLanes) V::store(d, V::zero());
    d = to;
  };
  for (int64_t n = 0; n < a.images; ++n) {
    const float* src = a.src + n * a.image_stride;
    zero_until(a.dst + (n * a.image_rows + a.lead_rows) * a.pitch + a.lead_cols);
    for (int64_t r = 0; r < a.rows; ++r, src += a.row_stride, d += a.pitch) {
      if (a.col_stride == 1) {
        for (int64_t c = 0; c < a.pitch; c += V::kLanes) V::store(d + c, V::load_first(src + c, a.cols - c));
      } else if (a.col_stride == 2) {
        for (int64_t c = 0; c < a.pitch; c += V::kLanes) V::store(d + c, V::load_even(src + 2 * c, a.cols - c));
      } else {
        for (int64_t c = 0; c < a.cols; ++c) d[c] = src[c * a.col_stride];
        for (int64_t c = a.cols; c < a.pitch; ++c) d[c] = 0.0f;
      }
    }
  }
  zero_until(a.dst + a.images * a.image_rows * a.pitch + a.tail);
}
