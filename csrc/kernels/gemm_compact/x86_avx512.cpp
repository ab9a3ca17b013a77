// AVX-512: 24 of 32 registers accumulate, as 8 filters x 3 vectors of 16 pixels, or 8 pixels x 3 panels of 16 filters.
#include <immintrin.h>

// GCC 12 takes the undefined operands inside its own unmasked intrinsics for variables of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"

__attribute__((noinline)) __m512 activated(__m512 r, const Epilogue& e) {
  return activate(ActiveVec{r}, e).v;
}

// Eight pixels of a filters kernel, and narrow panels in it.
struct Vec8 {
  using Reg = __m256;
  using Index = __m256i;
  using Lanes = __mmask8;
  using Across = Vec8;
  static constexpr int kLanes = 8;

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg clamp(Reg r, Reg low, Reg high) { return _mm256_min_ps(high, _mm256_max_ps(low, r)); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }

  static Index index(const int8_t* lane) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lane)));
  }
  static Lanes lanes(uint32_t bits) { return static_cast<Lanes>(bits); }
  static Reg permute(Reg r, Index i) { return _mm256_permutexvar_ps(i, r); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm256_maskz_loadu_ps(some, p); }
  static void store_lanes(float* p, Lanes some, Reg r) { _mm256_mask_storeu_ps(p, some, r); }
  static Reg curve(Reg r, const Epilogue& e) { return _mm512_castps512_ps256(activated(_mm512_castps256_ps512(r), e)); }
  template <int P>
  static void transpose(const Reg (&r)[P], float (&out)[8][8]) {
    transpose_plainly<P, 8, 8, Vec8>(r, out);
  }
};

struct Vec4 {
  using Reg = __m128;
  using Across = Vec8;
  static constexpr int kLanes = 4;
  static Reg load(const float* p) { return _mm_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm_storeu_ps(p, r); }
  template <int P>
  static void transpose(const Reg (&r)[P], float (&out)[4][8]) {
    transpose_plainly<P, 4, 8, Vec4>(r, out);
  }
};

struct Vec16 {
  using Reg = __m512;
  using Index = __m512i;
  using Lanes = __mmask16;
  using Across = Vec8;
  static constexpr int kLanes = 16;

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg clamp(Reg r, Reg low, Reg high) { return _mm512_min_ps(high, _mm512_max_ps(low, r)); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }

  static Index index(const int8_t* lane) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lane)));
  }
  static Lanes lanes(uint32_t bits) { return static_cast<Lanes>(bits); }
  static Reg permute(Reg r, Index i) { return _mm512_permutexvar_ps(i, r); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm512_maskz_loadu_ps(some, p); }
  static void store_lanes(float* p, Lanes some, Reg r) { _mm512_mask_storeu_ps(p, some, r); }
  static Reg curve(Reg r, const Epilogue& e) { return activated(r, e); }

  static Reg gather(const float* p, Index i) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(p), i, _mm512_loadu_ps(p + 16));
  }

  // r[p] holds 16 filters of pixel p; missing pixels are whatever.
  template <int P>
  static void transpose(const Reg (&some)[P], float (&out)[16][8]) {
    Reg r[8];
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) r[p] = some[p < P ? p : 0];
    Reg quad[8];  // [half of the pixels][i]: 128-bit lane L holds 4 pixels of filter 4 * L + i
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const Reg lo0 = _mm512_unpacklo_ps(r[4 * h], r[4 * h + 1]), hi0 = _mm512_unpackhi_ps(r[4 * h], r[4 * h + 1]);
      const Reg lo1 = _mm512_unpacklo_ps(r[4 * h + 2], r[4 * h + 3]);
      const Reg hi1 = _mm512_unpackhi_ps(r[4 * h + 2], r[4 * h + 3]);
      quad[4 * h] = _mm512_shuffle_ps(lo0, lo1, 0x44);
      quad[4 * h + 1] = _mm512_shuffle_ps(lo0, lo1, 0xEE);
      quad[4 * h + 2] = _mm512_shuffle_ps(hi0, hi1, 0x44);
      quad[4 * h + 3] = _mm512_shuffle_ps(hi0, hi1, 0xEE);
    }
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Reg a = _mm512_permutex2var_ps(quad[i], low, quad[i + 4]);
      const Reg b = _mm512_permutex2var_ps(quad[i], high, quad[i + 4]);
      _mm256_store_ps(out[i], _mm512_castps512_ps256(a));
      _mm256_store_ps(out[4 + i], _mm512_extractf32x8_ps(a, 1));
      _mm256_store_ps(out[8 + i], _mm512_castps512_ps256(b));
      _mm256_store_ps(out[12 + i], _mm512_extractf32x8_ps(b, 1));
    }
  }
};

constexpr GemmCompact make() {
  GemmCompact g{.isa = "avx512",
                .lanes = 16,
                .pixels = 8,
                .across = 8,
                .mr = {8, 8, 4},
                .nr = {3, 3, 6},
                .nv = {3, 1, 1},
                .gather = true,
                .pixels_cycles = {{7.5, 10.5, 15}, {7.5, 10.5, 15}, {5, 6, 8, 10, 12.5, 15}},
                .filters_cycles = {{7, 11.5, 17.5}, {6}, {6}},
                .pixels_kernel = {},
                .filters_kernel = {}};
  fill_pixels<Vec16, 8, false>(g.pixels_kernel[0][0], upto<3>());
  fill_pixels<Vec16, 8, false>(g.pixels_kernel[0][1], upto<3>());
  fill_pixels<Vec16, 4, false>(g.pixels_kernel[0][2], upto<6>());
  fill_pixels<Vec16, 8, true>(g.pixels_kernel[1][0], upto<3>());
  fill_pixels<Vec16, 8, true>(g.pixels_kernel[1][1], upto<3>());
  fill_pixels<Vec16, 4, true>(g.pixels_kernel[1][2], upto<6>());
  fill_filters<Vec16, 16, 1>(g.filters_kernel[0][0], upto<8>());
  fill_filters<Vec16, 16, 2>(g.filters_kernel[0][1], upto<8>());
  fill_filters<Vec16, 16, 3>(g.filters_kernel[0][2], upto<8>());
  fill_filters<Vec8, 8, 1>(g.filters_kernel[1][0], upto<8>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<8>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_avx512 = make();

}  // namespace structadmm::kernels
