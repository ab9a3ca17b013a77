// Vectors of f32 in AVX2, FMA and F16C; see vec_scalar.h for what the members do.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "base/tensor_view.h"

namespace structadmm {
namespace {
namespace avx2 {

// The first n of eight lanes.
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const Bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

  static Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
  static Vec load_n(const Bf16* p, int n) { return from_bf16(load_halves(p, n)); }
  static Vec load_n(const F16* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(F16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16()); }

  // Two halves that overlap instead of a masked store, which is microcoded on AMD before Zen 4 (a dozen cycles).
  void store_n(float* p, int n) const {
    const __m128 low = _mm256_castps256_ps128(v);
    if (n == 8) {
      _mm256_storeu_ps(p, v);
    } else if (n >= 4) {
      _mm_storeu_ps(p, low);
      _mm_storeu_ps(p + n - 4, _mm256_castps256_ps128(from_lane(n - 4)));
    } else if (n >= 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), low);
      _mm_storel_pi(reinterpret_cast<__m64*>(p + n - 2), _mm256_castps256_ps128(from_lane(n - 2)));
    } else if (n == 1) {
      _mm_store_ss(p, low);
    }
  }
  void store_n(Bf16* p, int n) const { store_halves(p, n, to_bf16()); }
  void store_n(F16* p, int n) const { store_halves(p, n, to_f16()); }

  static Vec load_lanes(const float* p, int first, int last) { return {_mm256_maskload_ps(p, lanes(first, last))}; }
  static Vec load_lanes(const Bf16* p, int first, int last) {
    uint16_t buffer[8] = {};
    std::memcpy(buffer + first, p + first, 2 * static_cast<size_t>(last - first));
    return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer)));
  }
  void store_lanes(float* p, int first, int last) const {
    if (first == 0) return store_n(p, last);
    if (first < last) Vec{from_lane(first)}.store_n(p + first, last - first);
  }
  void store_lanes(Bf16* p, int first, int last) const {
    uint16_t buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), to_bf16());
    std::memcpy(p + first, buffer + first, 2 * static_cast<size_t>(last - first));
  }

 private:
  // Lanes from the n-th on, then any.
  __m256 from_lane(int n) const {
    const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_permutevar8x32_ps(v, at);
  }
  static __m256i lanes(int first, int last) { return _mm256_andnot_si256(first_lanes(first), first_lanes(last)); }
  static Vec from_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  __m128i to_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i h = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    h = _mm256_blendv_epi8(_mm256_srli_epi32(h, 16), _mm256_set1_epi32(0x7fc0), nan);
    // packus works in 128-bit halves; bring the two useful quarters together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  template <class T>
  static __m128i load_halves(const T* p, int n) {
    uint16_t buffer[8] = {};
    std::memcpy(buffer, p, 2 * static_cast<size_t>(n));
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  template <class T>
  static void store_halves(T* p, int n, __m128i h) {
    uint16_t buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), h);
    std::memcpy(p, buffer, 2 * static_cast<size_t>(n));
  }
};

inline Vec operator+(Vec x, Vec y) {
  return {_mm256_add_ps(x.v, y.v)};
}
inline Vec operator-(Vec x, Vec y) {
  return {_mm256_sub_ps(x.v, y.v)};
}
inline Vec operator*(Vec x, Vec y) {
  return {_mm256_mul_ps(x.v, y.v)};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.v, y.v, z.v)};
}

struct Mask {
  __m256i m;  // all ones where true

  static Mask all() { return {_mm256_set1_epi32(-1)}; }
  static Mask load(const uint8_t* p) { return from_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static Mask load_n(const uint8_t* p, int n) {
    uint8_t buffer[8] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n));
    return load(buffer);
  }

 private:
  static Mask from_bytes(__m128i b) { return {_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(b), _mm256_setzero_si256())}; }
};

inline Mask operator&(Mask x, Mask y) {
  return {_mm256_and_si256(x.m, y.m)};
}
inline Vec where(Mask m, Vec x) {
  return {_mm256_and_ps(_mm256_castsi256_ps(m.m), x.v)};
}

struct Sums {
  __m256d lo, hi;

  static Sums load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  void store(double* p) const {
    _mm256_storeu_pd(p, lo);
    _mm256_storeu_pd(p + 4, hi);
  }
  void add(Vec x) {
    lo = _mm256_add_pd(lo, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
    hi = _mm256_add_pd(hi, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
  }
};

}  // namespace avx2
}  // namespace
}  // namespace structadmm
