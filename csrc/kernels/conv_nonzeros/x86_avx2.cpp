// AVX2 and FMA: up to 12 of 16 registers accumulate.
#include <immintrin.h>

#include <utility>

#include "kernels/conv_nonzeros/conv_nonzeros.h"
#include "kernels/conv_nonzeros/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/conv_nonzeros/generic.h"

struct Vec8 {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg load(const float* p) { return _mm256_load_ps(p); }
  static Reg broadcast(float x) { return _mm256_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg clamp(Reg x, Reg low, Reg high) { return _mm256_min_ps(high, _mm256_max_ps(low, x)); }
  static Reg curve(Reg x, const Epilogue& epilogue) { return activate(ActiveVec{x}, epilogue).v; }
  static void store(float* p, Reg r) { _mm256_store_ps(p, r); }

  static Reg permute(Reg r, const int32_t* from) {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i gone = _mm256_srai_epi32(index, 31);
    return _mm256_andnot_ps(_mm256_castsi256_ps(gone), _mm256_permutevar8x32_ps(r, index));
  }
  static __m128i mask(uint8_t bits) {
    const __m128i bit = _mm_setr_epi32(1, 2, 4, 8);
    return _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(bits), bit), bit);
  }
  // Lane by lane: a masked store is microcoded on AMD before Zen 4 and costs more than four of one element.
  static void store_piece(float* p, uint8_t bits, __m128 r) {
    if (bits == 0xF) return _mm_storeu_ps(p, r);
    if (bits & 1) _mm_store_ss(p, r);
    if (bits & 2) _mm_store_ss(p + 1, _mm_shuffle_ps(r, r, 1));
    if (bits & 4) _mm_store_ss(p + 2, _mm_unpackhi_ps(r, r));
    if (bits & 8) _mm_store_ss(p + 3, _mm_shuffle_ps(r, r, 3));
  }
  static Reg load_pieces(const float* p, const int64_t* lane) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + lane[0])), _mm_loadu_ps(p + lane[4]), 1);
  }
  static Reg load_pieces(const float* p, const int64_t* lane, const uint8_t* bits) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_maskload_ps(p + lane[0], mask(bits[0]))),
                                _mm_maskload_ps(p + lane[4], mask(bits[4])), 1);
  }
  static void store_pieces(float* p, const int64_t* lane, Reg r) {
    _mm_storeu_ps(p + lane[0], _mm256_castps256_ps128(r));
    _mm_storeu_ps(p + lane[4], _mm256_extractf128_ps(r, 1));
  }
  static void store_pieces(float* p, const int64_t* lane, const uint8_t* bits, Reg r) {
    store_piece(p + lane[0], bits[0], _mm256_castps256_ps128(r));
    store_piece(p + lane[4], bits[4], _mm256_extractf128_ps(r, 1));
  }
  static void transpose(Reg (&r)[4]) {
    const Reg a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const Reg c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    r[0] = _mm256_shuffle_ps(a, c, 0x44);
    r[1] = _mm256_shuffle_ps(a, c, 0xEE);
    r[2] = _mm256_shuffle_ps(b, d, 0x44);
    r[3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
};

}  // namespace

extern constinit const ConvNonzeros conv_nonzeros_avx2 = make<Vec8, 12>("avx2", 576, 850);

}  // namespace structadmm::kernels
