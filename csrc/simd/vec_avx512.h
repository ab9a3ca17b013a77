// Vectors of f32 in AVX-512 F, BW, DQ and VL; see vec_scalar.h for what the members do.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "base/tensor_view.h"

namespace structadmm {
namespace {
namespace avx512 {

inline __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const Bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
  static Vec load_n(const Bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
  static Vec load_n(const F16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(F16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }

  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  void store_n(Bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16()); }
  void store_n(F16* p, int n) const { _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16()); }

  static Vec load_lanes(const float* p, int first, int last) { return {_mm512_maskz_loadu_ps(lanes(first, last), p)}; }
  static Vec load_lanes(const Bf16* p, int first, int last) {
    return from_bf16(_mm256_maskz_loadu_epi16(lanes(first, last), p));
  }
  void store_lanes(float* p, int first, int last) const { _mm512_mask_storeu_ps(p, lanes(first, last), v); }
  void store_lanes(Bf16* p, int first, int last) const { _mm256_mask_storeu_epi16(p, lanes(first, last), to_bf16()); }

  // AVX512-BF16 has an instruction for this, but flushes subnormals; rounding by integers does as torch does.
  __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i h = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(h, nan, _mm512_set1_epi32(0x7fc0)));
  }

 private:
  static __mmask16 lanes(int first, int last) {
    return static_cast<__mmask16>(first_lanes(last) & ~first_lanes(first));
  }
  static Vec from_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

inline Vec operator+(Vec x, Vec y) {
  return {_mm512_add_ps(x.v, y.v)};
}
inline Vec operator-(Vec x, Vec y) {
  return {_mm512_sub_ps(x.v, y.v)};
}
inline Vec operator*(Vec x, Vec y) {
  return {_mm512_mul_ps(x.v, y.v)};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm512_fmadd_ps(x.v, y.v, z.v)};
}

struct Mask {
  __mmask16 m;

  static Mask all() { return {static_cast<__mmask16>(0xffff)}; }
  static Mask load(const uint8_t* p) { return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Mask load_n(const uint8_t* p, int n) { return from_bytes(_mm_maskz_loadu_epi8(first_lanes(n), p)); }

 private:
  static Mask from_bytes(__m128i b) { return {_mm_test_epi8_mask(b, b)}; }
};

inline Mask operator&(Mask x, Mask y) {
  return {static_cast<__mmask16>(x.m & y.m)};
}
inline Vec where(Mask m, Vec x) {
  return {_mm512_maskz_mov_ps(m.m, x.v)};
}

struct Sums {
  __m512d s;

  static Sums load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, s); }
  void add(Vec x) {
    s = _mm512_add_pd(s, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    s = _mm512_add_pd(s, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
};

}  // namespace avx512
}  // namespace
}  // namespace structadmm
