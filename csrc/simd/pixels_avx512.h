// What kernels over planes of pixels need beside simd/vec_avx512.h; see pixels_scalar.h for what the functions do.
#pragma once

#include "simd/vec_avx512.h"

namespace structadmm {
namespace {
namespace avx512 {

inline Vec max_or_nan(Vec x, Vec y) {
  return {_mm512_mask_max_ps(x.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), x.v, y.v)};
}
inline Vec even(Vec x, Vec y) {
  const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(x.v, lanes, y.v)};
}
inline Vec load_even(const float* p) {
  return even(Vec::load(p), Vec::load(p + Vec::kWidth));
}
// The even ones are the lower halves of 32 bits.
inline Vec load_even(const Bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec load_strided(const Bf16* p, int64_t stride) {
  alignas(64) uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint32_t>(p[i * stride].bits) << 16;
  return {_mm512_castsi512_ps(_mm512_load_si512(bits))};
}
inline Vec load_strided(const float* p, int64_t stride) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride))), p, 4)};
}
// Lane i of r[j] is element 3 * i + j of 48: the first two vectors give those below 32, the third the rest.
template <class T>
inline void load_triples(const T* p, Vec (&r)[3]) {
  const __m512 a = Vec::load(p).v, b = Vec::load(p + 16).v, c = Vec::load(p + 32).v;
  const __m512i lanes = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
  for (int j = 0; j < 3; ++j) {
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(j));
    const __mmask16 third = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32));
    r[j].v = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, at, b), third, at, c);
  }
}
inline void transpose(Vec (&r)[16]) {
  __m512 q[16];  // [four rows][i]: 128-bit lane L holds four rows of column 4 * L + i
#pragma GCC unroll 4
  for (int h = 0; h < 16; h += 4) {
    const __m512 lo0 = _mm512_unpacklo_ps(r[h].v, r[h + 1].v), hi0 = _mm512_unpackhi_ps(r[h].v, r[h + 1].v);
    const __m512 lo1 = _mm512_unpacklo_ps(r[h + 2].v, r[h + 3].v), hi1 = _mm512_unpackhi_ps(r[h + 2].v, r[h + 3].v);
    q[h] = _mm512_shuffle_ps(lo0, lo1, 0x44);
    q[h + 1] = _mm512_shuffle_ps(lo0, lo1, 0xEE);
    q[h + 2] = _mm512_shuffle_ps(hi0, hi1, 0x44);
    q[h + 3] = _mm512_shuffle_ps(hi0, hi1, 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even0 = _mm512_shuffle_f32x4(q[i], q[i + 4], 0x88), odd0 = _mm512_shuffle_f32x4(q[i], q[i + 4], 0xDD);
    const __m512 even1 = _mm512_shuffle_f32x4(q[i + 8], q[i + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(q[i + 8], q[i + 12], 0xDD);
    r[i].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[i + 4].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    r[i + 12].v = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
  }
}
inline float sum(Vec v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace avx512
}  // namespace
}  // namespace structadmm
