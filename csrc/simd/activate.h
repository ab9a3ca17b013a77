// Activation curves over the vector types: activate(r, epilogue) is Epilogue's activation of every lane of r.
//
// Includes the vector type of the instruction set that the file is compiled for; ActiveVec names it. Curves are within
// 2 units in the last place of the exact one (GELU below -1: x^2 units, for it ends as e^(-x^2 / 2)); NaN stays NaN.
// kClamp gives the same bits everywhere; the rest may differ in the last bits between instruction sets.
//
// Everything but clamp() is large: call it out of line, once per kernel room and instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/epilogue.h"

#if defined(__AVX512F__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_scalar.h"
#endif

namespace structadmm {
namespace {

// a < b is false for NaN: least(b, x) and most(b, x) are x where x is NaN.
#if defined(__AVX512F__)

namespace avx512 {
inline Vec least(Vec b, Vec x) {
  return {_mm512_min_ps(b.v, x.v)};
}
inline Vec most(Vec b, Vec x) {
  return {_mm512_max_ps(b.v, x.v)};
}
inline Vec over(Vec x, Vec y) {
  return {_mm512_div_ps(x.v, y.v)};
}
inline Vec magnitude(Vec x) {
  return {_mm512_abs_ps(x.v)};
}
inline Vec negated(Vec x) {
  return {_mm512_xor_ps(x.v, _mm512_set1_ps(-0.0f))};
}
inline Vec with_sign(Vec x, Vec sign) {
  return {_mm512_or_ps(x.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for integers n.
inline Vec times_power(Vec x, Vec n) {
  return {_mm512_scalef_ps(x.v, n.v)};
}
inline Vec mul_add(Vec x, Vec y, Vec z) {
  return fma(x, y, z);
}
}  // namespace avx512
using ActiveVec = avx512::Vec;

#elif defined(__AVX2__)

namespace avx2 {
inline Vec least(Vec b, Vec x) {
  return {_mm256_min_ps(b.v, x.v)};
}
inline Vec most(Vec b, Vec x) {
  return {_mm256_max_ps(b.v, x.v)};
}
inline Vec over(Vec x, Vec y) {
  return {_mm256_div_ps(x.v, y.v)};
}
inline Vec magnitude(Vec x) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)};
}
inline Vec negated(Vec x) {
  return {_mm256_xor_ps(x.v, _mm256_set1_ps(-0.0f))};
}
inline Vec with_sign(Vec x, Vec sign) {
  return {_mm256_or_ps(x.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec nearest(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for integers n, -252 to 254, in two steps: 2^128 and 2^-150 are no floats.
inline Vec times_power(Vec x, Vec n) {
  const __m256i all = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(all, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(all, half);
  x.v = _mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)))};
}
inline Vec mul_add(Vec x, Vec y, Vec z) {
  return fma(x, y, z);
}
}  // namespace avx2
using ActiveVec = avx2::Vec;

#else

namespace scalar {
inline Vec least(const Vec& b, Vec x) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = b.a[i] < x.a[i] ? b.a[i] : x.a[i];
  return x;
}
inline Vec most(const Vec& b, Vec x) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = b.a[i] > x.a[i] ? b.a[i] : x.a[i];
  return x;
}
inline Vec over(Vec x, const Vec& y) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] /= y.a[i];
  return x;
}
inline Vec magnitude(Vec x) {
  for (float& e : x.a) e = __builtin_fabsf(e);
  return x;
}
inline Vec negated(Vec x) {
  for (float& e : x.a) e = -e;
  return x;
}
inline Vec with_sign(Vec x, const Vec& sign) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = __builtin_copysignf(x.a[i], sign.a[i]);
  return x;
}
inline Vec if_less(const Vec& a, const Vec& b, Vec yes, const Vec& no) {
  for (int i = 0; i < Vec::kWidth; ++i) yes.a[i] = a.a[i] < b.a[i] ? yes.a[i] : no.a[i];
  return yes;
}
// Of |x| < 2^22: what is added and taken away leaves no bit for a fraction.
inline Vec nearest(Vec x) {
  for (float& e : x.a) e = (e + 0x1.8p23f) - 0x1.8p23f;
  return x;
}
inline Vec times_power(Vec x, const Vec& n) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    // A conversion of NaN has no defined value.
    const int32_t all = n.a[i] == n.a[i] ? static_cast<int32_t>(n.a[i]) : 0, half = all / 2;
    for (const int32_t power : {half, all - half}) {
      const int32_t bits = (power + 127) << 23;
      float factor;
      std::memcpy(&factor, &bits, 4);
      x.a[i] *= factor;
    }
  }
  return x;
}
// fmaf is a call on the platform's baseline; a curve needs no particular last bit.
inline Vec mul_add(Vec x, const Vec& y, const Vec& z) {
  for (int i = 0; i < Vec::kWidth; ++i) x.a[i] = x.a[i] * y.a[i] + z.a[i];
  return x;
}
}  // namespace scalar
using ActiveVec = scalar::Vec;

#endif

template <class V>
inline V clamp(V x, V low, V high) {
  return least(high, most(low, x));
}

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1)
template <class V, int n>
inline V polynomial(V x, const float (&c)[n]) {
  V sum = V::set1(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = mul_add(sum, x, V::set1(c[i]));
  return sum;
}

// e^x = 2^n e^r, r = x - n ln 2 in two steps, |r| <= 0.35: 1 + r + r^2 p(r), p minimax, 3e-9 off.
template <class V>
inline V exponential(V x) {
  x = clamp(x, V::set1(-104.0f), V::set1(89.0f));  // 0 and infinity beyond
  const V n = nearest(x * V::set1(0x1.715476p0f));
  const V r = mul_add(n, V::set1(-0x1.7f7d1cp-20f), mul_add(n, V::set1(-0x1.62e4p-1f), x));
  const float p[] = {0.49999993f, 0.16666519f, 0.04166841f, 0.0083689f, 0.00138142f};
  return times_power(mul_add(polynomial(r, p), r * r, r) + V::set1(1.0f), n);
}

// 1 / (1 + e^-x)
template <class V>
inline V sigmoid(V x) {
  return over(V::set1(1.0f), V::set1(1.0f) + exponential(negated(x)));
}

// x + x^3 p(x^2), p minimax, 1e-9 off, below 0.55; there and above 1 - 2 / (1 + e^2x) loses no more than an ulp.
template <class V>
inline V hyperbolic_tangent(V x) {
  const V a = magnitude(x), s = x * x, one = V::set1(1.0f);
  const float p[] = {-0.33333315f, 0.13332481f, -0.05384052f, 0.02102056f, -0.00619873f};
  const V near = mul_add(polynomial(s, p) * s, a, a);
  const V far = one - over(V::set1(2.0f), one + exponential(a + a));
  return with_sign(if_less(a, V::set1(0.55f), near, far), x);
}

// x Phi(x), Phi(x) = c for x < 0 and 1 - c above, c = erfc(z) / 2, z = |x| / sqrt 2; erfc(z) = e^(-z^2) p(t), t = 1 /
// (1 + 0.35 z), p minimax on z <= 9.5, 1.6e-8 off; further out e^(-z^2) is zero.
template <class V>
inline V gelu(V x) {
  const V z = magnitude(x) * V::set1(0x1.6a09e6p-1f), one = V::set1(1.0f);
  const V t = over(one, mul_add(z, V::set1(0.35f), one));
  const float p[] = {-5.65695e-05f, 0.19872183f,  0.18530869f, 0.25288156f,  -0.07608888f,
                     0.67524239f,   -0.74443103f, 0.84358732f, -0.40206032f, 0.06689499f};
  const V c = V::set1(0.5f) * polynomial(t, p) * exponential(negated(z * z));
  return x * if_less(x, V::zero(), c, one - c);
}

// x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
inline V gelu_tanh(V x) {
  const V minus_two_u = x * mul_add(x * x, V::set1(-0.0713548162726f), V::set1(-1.59576912161f));
  return over(x, V::set1(1.0f) + exponential(minus_two_u));
}

template <class V>
inline V hard_sigmoid(V x) {
  return clamp(x + V::set1(3.0f), V::zero(), V::set1(6.0f)) * V::set1(1.0f / 6.0f);
}

template <class V>
inline V activate(V x, const Epilogue& e) {
  switch (e.activation) {
    case Activation::kClamp:
      return clamp(x, V::set1(e.low), V::set1(e.high));
    case Activation::kSilu:
      return over(x, V::set1(1.0f) + exponential(negated(x)));
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kHardswish:
      return x * hard_sigmoid(x);
    case Activation::kHardsigmoid:
      return hard_sigmoid(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return hyperbolic_tangent(x);
    case Activation::kLeakyRelu:
      return if_less(x, V::zero(), x * V::set1(e.slope), x);
  }
  return x;
}

}  // namespace
}  // namespace structadmm
