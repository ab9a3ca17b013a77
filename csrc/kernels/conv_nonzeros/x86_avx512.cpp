// AVX-512: up to 28 of 32 registers accumulate, and multiply-adds take the patch from memory.
#include <immintrin.h>

#include <utility>

#include "kernels/conv_nonzeros/conv_nonzeros.h"
#include "kernels/conv_nonzeros/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/conv_nonzeros/generic.h"

struct Vec16 {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg load(const float* p) { return _mm512_load_ps(p); }
  static Reg broadcast(float x) { return _mm512_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg clamp(Reg x, Reg low, Reg high) { return _mm512_min_ps(high, _mm512_max_ps(low, x)); }
  static Reg curve(Reg x, const Epilogue& epilogue) { return activate(ActiveVec{x}, epilogue).v; }
  static void store(float* p, Reg r) { _mm512_store_ps(p, r); }

  static Reg permute(Reg r, const int32_t* from) {
    const __m512i index = _mm512_loadu_si512(from);
    return _mm512_maskz_permutexvar_ps(_mm512_cmpge_epi32_mask(index, _mm512_setzero_si512()), index, r);
  }
  static Reg load_pieces(const float* p, const int64_t* lane) {
    const __m512 low = _mm512_castps256_ps512(
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + lane[0])), _mm_loadu_ps(p + lane[4]), 1));
    const __m256 high =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + lane[8])), _mm_loadu_ps(p + lane[12]), 1);
    return _mm512_insertf32x8(low, high, 1);
  }
  static Reg load_pieces(const float* p, const int64_t* lane, const uint8_t* bits) {
    const __m512 low = _mm512_castps256_ps512(_mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_maskz_loadu_ps(bits[0], p + lane[0])), _mm_maskz_loadu_ps(bits[4], p + lane[4]), 1));
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_maskz_loadu_ps(bits[8], p + lane[8])),
                                             _mm_maskz_loadu_ps(bits[12], p + lane[12]), 1);
    return _mm512_insertf32x8(low, high, 1);
  }
  static void store_pieces(float* p, const int64_t* lane, Reg r) {
    _mm_storeu_ps(p + lane[0], _mm512_castps512_ps128(r));
    _mm_storeu_ps(p + lane[4], _mm512_extractf32x4_ps(r, 1));
    _mm_storeu_ps(p + lane[8], _mm512_extractf32x4_ps(r, 2));
    _mm_storeu_ps(p + lane[12], _mm512_extractf32x4_ps(r, 3));
  }
  static void store_pieces(float* p, const int64_t* lane, const uint8_t* bits, Reg r) {
    _mm_mask_storeu_ps(p + lane[0], bits[0], piece<0>(r));
    _mm_mask_storeu_ps(p + lane[4], bits[4], piece<1>(r));
    _mm_mask_storeu_ps(p + lane[8], bits[8], piece<2>(r));
    _mm_mask_storeu_ps(p + lane[12], bits[12], piece<3>(r));
  }
  // Kept apart from the store: GCC would make one masked VEXTRACTF32X4, which faults on what its mask leaves out.
  template <int k>
  static __m128 piece(Reg r) {
    __m128 x = _mm512_extractf32x4_ps(r, k);
    asm("" : "+v"(x));
    return x;
  }
  static void transpose(Reg (&r)[4]) {
    const Reg a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const Reg c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    r[0] = _mm512_shuffle_ps(a, c, 0x44);
    r[1] = _mm512_shuffle_ps(a, c, 0xEE);
    r[2] = _mm512_shuffle_ps(b, d, 0x44);
    r[3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
};

}  // namespace

extern constinit const ConvNonzeros conv_nonzeros_avx512 = make<Vec16, 28>("avx512", 576, 576);
extern constinit const ConvNonzeros conv_nonzeros_avx512_zen5 = make<Vec16, 28>("avx512", 900, 900);

}  // namespace structadmm::kernels
