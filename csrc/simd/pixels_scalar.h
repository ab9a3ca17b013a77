// What kernels over planes of pixels need beside simd/vec_scalar.h; pixels_avx2.h and pixels_avx512.h have the same.
//
//   max_or_nan(x, y)            the larger one, NaN if either is
//   even(x, y)                  x[0], x[2], ... y[0], y[2], ...
//   load_even(p)                p[0], p[2], ... of two vectors
//   load_strided(p, stride)     p[0], p[stride], ...
//   load_triples(p, r)          r[j] lane i = p[3 * i + j]: three vectors deinterleaved
//   transpose(r)                r[j] lane i = r[i] lane j
//   sum(v)                      over the lanes
#pragma once

#include <cstdint>

#include "simd/vec_scalar.h"

namespace structadmm {
namespace {
namespace scalar {

inline float max_or_nan(float x, float y) {
  return y > x || y != y ? y : x;
}
inline Vec max_or_nan(Vec x, const Vec& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = max_or_nan(x.a[i], y.a[i]);
  return x;
}
template <class T>
inline Vec load_strided(const T* p, int64_t stride) {
  Vec v;
  for (int i = 0; i < Vec::kWidth; ++i) v.a[i] = to_float(p[i * stride]);
  return v;
}
inline Vec even(Vec x, Vec y) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) r.a[i] = 2 * i < Vec::kWidth ? x.a[2 * i] : y.a[2 * i - Vec::kWidth];
  return r;
}
template <class T>
inline Vec load_even(const T* p) {
  return load_strided(p, 2);
}
template <class T>
inline void load_triples(const T* p, Vec (&r)[3]) {
  for (int i = 0; i < 3 * Vec::kWidth; ++i) r[i % 3].a[i / 3] = to_float(p[i]);
}
inline void transpose(Vec (&r)[Vec::kWidth]) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = r[i].a[j];
      r[i].a[j] = r[j].a[i];
      r[j].a[i] = t;
    }
  }
}
inline float sum(const Vec& v) {
  return ((v.a[0] + v.a[4]) + (v.a[2] + v.a[6])) + ((v.a[1] + v.a[5]) + (v.a[3] + v.a[7]));
}

}  // namespace scalar
}  // namespace
}  // namespace structadmm
