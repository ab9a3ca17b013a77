// Vectors of f32 in plain C++, the baseline of the vector types: vec_avx2.h and vec_avx512.h have the same members, and
// a kernel written over them computes the same bits with each. Eight lanes, so that the compiler can use what the
// platform has.
//
//   Vec    kWidth floats. load/store convert bf16 and f16 (round to nearest even); load_n reads n < kWidth elements and
//          fills with zeros, store_n writes n; load_lanes and store_lanes do that for lanes first to last - 1, p being
//          where lane 0 would lie.
//   Mask   one truth value per lane, from bytes (nonzero is true).
//   Sums   eight f64 accumulators: lane i of a vector goes to accumulator i mod 8, whatever kWidth is.
//
// All names have internal linkage: an object compiled for one instruction set must not offer its code to the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/tensor_view.h"

namespace structadmm {
namespace {
namespace scalar {

inline float to_float(float x) {
  return x;
}

inline float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;  // infinity, NaN
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);  // normal: the exponent's bias goes from 15 to 127
  } else {
    const float tiny = static_cast<float>(rest) * 0x1p-24f;  // subnormal
    std::memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float f, float& out) {
  out = f;
}

inline void from_float(float f, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_float(float f, F16& out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (bits < 0x38800000) {
    // Subnormal: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded by the addition itself.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

struct Vec {
  static constexpr int kWidth = 8;
  float a[kWidth];

  static Vec set1(float x) {
    Vec v;
    for (float& e : v.a) e = x;
    return v;
  }
  static Vec zero() { return set1(0.0f); }

  template <class T>
  static Vec load(const T* p) {
    Vec v;
    for (int i = 0; i < kWidth; ++i) v.a[i] = to_float(p[i]);
    return v;
  }
  template <class T>
  static Vec load_n(const T* p, int n) {
    Vec v = zero();
    for (int i = 0; i < n; ++i) v.a[i] = to_float(p[i]);
    return v;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kWidth; ++i) from_float(a[i], p[i]);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) from_float(a[i], p[i]);
  }
  template <class T>
  static Vec load_lanes(const T* p, int first, int last) {
    Vec v = zero();
    for (int i = first; i < last; ++i) v.a[i] = to_float(p[i]);
    return v;
  }
  template <class T>
  void store_lanes(T* p, int first, int last) const {
    for (int i = first; i < last; ++i) from_float(a[i], p[i]);
  }
};

inline Vec operator+(Vec x, const Vec& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] += y.a[i];
  return x;
}
inline Vec operator-(Vec x, const Vec& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] -= y.a[i];
  return x;
}
inline Vec operator*(Vec x, const Vec& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] *= y.a[i];
  return x;
}
// x * y + z with one rounding.
inline Vec fma(const Vec& x, const Vec& y, Vec z) {
  for (int i = 0; i < Vec::kWidth; ++i) z.a[i] = __builtin_fmaf(x.a[i], y.a[i], z.a[i]);
  return z;
}

struct Mask {
  bool a[Vec::kWidth];

  static Mask all() { return load_n(nullptr, 0, true); }
  static Mask load(const uint8_t* p) { return load_n(p, Vec::kWidth); }
  static Mask load_n(const uint8_t* p, int n, bool rest = false) {
    Mask m;
    for (int i = 0; i < Vec::kWidth; ++i) m.a[i] = i < n ? p[i] != 0 : rest;
    return m;
  }
};

inline Mask operator&(Mask x, const Mask& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = x.a[i] && y.a[i];
  return x;
}
// x where the mask is true, +0 elsewhere.
inline Vec where(const Mask& m, Vec x) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = m.a[i] ? x.a[i] : 0.0f;
  return x;
}

struct Sums {
  double a[8];

  static Sums load(const double* p) {
    Sums s;
    std::memcpy(s.a, p, sizeof s.a);
    return s;
  }
  void store(double* p) const { std::memcpy(p, a, sizeof a); }
  void add(const Vec& x) {
    for (int i = 0; i < 8; ++i) a[i] += static_cast<double>(x.a[i]);
  }
};

}  // namespace scalar
}  // namespace
}  // namespace structadmm
