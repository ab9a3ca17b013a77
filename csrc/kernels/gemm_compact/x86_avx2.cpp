// AVX2 and FMA: 12 of 16 registers accumulate, as 4 filters x 3 vectors of 8 pixels, or 6 pixels x one panel of 16
// filters.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"

__attribute__((noinline)) __m256 activated(__m256 r, const Epilogue& e) {
  return activate(ActiveVec{r}, e).v;
}

struct Vec8 {
  using Reg = __m256;
  using Index = __m256i;
  using Lanes = __m256i;
  using Across = Vec8;
  static constexpr int kLanes = 8;

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }

  static Index index(const int8_t* lane) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lane)));
  }
  static Lanes lanes(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
  }
  static Reg permute(Reg r, Index i) { return _mm256_permutevar8x32_ps(r, i); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm256_maskload_ps(p, some); }
  // Microcoded on AMD before Zen 4, but no slower there than one store per lane.
  static void store_lanes(float* p, Lanes some, Reg r) { _mm256_maskstore_ps(p, some, r); }
  static Reg curve(Reg r, const Epilogue& e) { return activated(r, e); }
  static void transpose(const float* sums, int64_t stride, float (&out)[8][8]) { transpose_plainly(sums, stride, out); }
};

struct Vec4 {
  using Reg = __m128;
  using Across = Vec8;
  static constexpr int kLanes = 4;
  static Reg load(const float* p) { return _mm_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm_storeu_ps(p, r); }
};

constexpr GemmCompact make() {
  GemmCompact g{.isa = "avx2",
                .lanes = 8,
                .pixels = {{6}, {6}, {6}},
                .mr = {4, 4, 4},
                .nr = {3, 3, 3},
                .nv = {1, 1, 1},
                .gather = false,
                .pixels_cycles = {{4.5, 5, 7}, {4.5, 5, 7}, {4.5, 5, 7}},
                .filters_cycles = {{7}, {5}, {5}},
                .pixels_kernel = {},
                .filters_kernel = {},
                .spread = &spread<Vec8>};
  for (auto& row : g.pixels_kernel[0]) fill_pixels<Vec8, 4, false>(row, upto<3>());
  fill_filters<Vec8, 16, 1>(g.filters_kernel[0][0], upto<6>());
  fill_filters<Vec8, 8, 1>(g.filters_kernel[1][0], upto<6>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<6>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_avx2 = make();

}  // namespace structadmm::kernels
