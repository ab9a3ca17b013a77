// What kernels over planes of pixels need beside simd/vec_avx2.h; see pixels_scalar.h for what the functions do.
#pragma once

#include "simd/vec_avx2.h"

namespace structadmm {
namespace {
namespace avx2 {

inline Vec max_or_nan(Vec x, Vec y) {
  return {_mm256_blendv_ps(_mm256_max_ps(x.v, y.v), x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
inline Vec even(Vec x, Vec y) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(x.v, y.v, 0x88));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8))};
}
inline Vec load_even(const float* p) {
  return even(Vec::load(p), Vec::load(p + Vec::kWidth));
}
// The even ones are the lower halves of 32 bits.
inline Vec load_even(const Bf16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
}
inline Vec load_strided(const Bf16* p, int64_t stride) {
  alignas(32) uint32_t bits[8];
  for (int i = 0; i < 8; ++i) bits[i] = static_cast<uint32_t>(p[i * stride].bits) << 16;
  return {_mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(bits)))};
}
inline Vec load_strided(const float* p, int64_t stride) {
  const __m256i i =
      _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(stride)));
  return {_mm256_i32gather_ps(p, i, 4)};
}
// Lane i of r[j] is element 3 * i + j of 24: of the three vectors, each holds it in lane (3 * i + j) mod 8, and which
// one holds it is the same for all j but where a vector ends.
template <class T>
inline void load_triples(const T* p, Vec (&r)[3]) {
  const __m256 a = Vec::load(p).v, b = Vec::load(p + 8).v, c = Vec::load(p + 16).v;
  const __m256 m0 = _mm256_blend_ps(_mm256_blend_ps(a, b, 0x92), c, 0x24);
  const __m256 m1 = _mm256_blend_ps(_mm256_blend_ps(a, b, 0x24), c, 0x49);
  const __m256 m2 = _mm256_blend_ps(_mm256_blend_ps(a, b, 0x49), c, 0x92);
  r[0].v = _mm256_permutevar8x32_ps(m0, _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
  r[1].v = _mm256_permutevar8x32_ps(m1, _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6));
  r[2].v = _mm256_permutevar8x32_ps(m2, _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
}
inline void transpose(Vec (&r)[8]) {
  __m256 q[8];
  for (int h = 0; h < 8; h += 4) {
    const __m256 lo0 = _mm256_unpacklo_ps(r[h].v, r[h + 1].v), hi0 = _mm256_unpackhi_ps(r[h].v, r[h + 1].v);
    const __m256 lo1 = _mm256_unpacklo_ps(r[h + 2].v, r[h + 3].v), hi1 = _mm256_unpackhi_ps(r[h + 2].v, r[h + 3].v);
    q[h] = _mm256_shuffle_ps(lo0, lo1, 0x44);
    q[h + 1] = _mm256_shuffle_ps(lo0, lo1, 0xEE);
    q[h + 2] = _mm256_shuffle_ps(hi0, hi1, 0x44);
    q[h + 3] = _mm256_shuffle_ps(hi0, hi1, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(q[i], q[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(q[i], q[i + 4], 0x31);
  }
}
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace avx2
}  // namespace
}  // namespace structadmm
