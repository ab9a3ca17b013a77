// AVX-512: 24 of 32 registers accumulate, as 8 filters x 3 vectors of 16 pixels, 4 x 6, or 6 pixels x 4 panels of 16
// filters.
#include <immintrin.h>

// GCC 12 takes the undefined operands inside its own unmasked intrinsics for variables of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"
#include "simd/activate.h"
#include "simd/vec_avx512.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"
#include "kernels/gemm_compact/panel.h"

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
  static constexpr int kRun = 1;
  static constexpr bool kMasks = true;

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
  static Lanes lanes(uint32_t bits) { return static_cast<Lanes>(bits); }
  static Reg permute(Reg r, Index i) { return _mm256_permutexvar_ps(i, r); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm256_maskz_loadu_ps(some, p); }
  static void store_lanes(float* p, Lanes some, Reg r) { _mm256_mask_storeu_ps(p, some, r); }
  static Reg curve(Reg r, const Epilogue& e) { return _mm512_castps512_ps256(activated(_mm512_castps256_ps512(r), e)); }
};

struct Vec4 {
  using Reg = __m128;
  using Across = Vec8;
  static constexpr int kLanes = 4;
  static constexpr int kRun = 1;
  static Reg load(const float* p) { return _mm_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm_storeu_ps(p, r); }
};

struct Vec16 {
  using Reg = __m512;
  using Index = __m512i;
  using Lanes = __mmask16;
  using Across = Vec8;
  static constexpr int kLanes = 16;
  static constexpr int kRun = 1;
  static constexpr bool kMasks = true;

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static void stream(float* p, Reg r) { _mm512_stream_ps(p, r); }  // p: aligned to a line

  static Index index(const int8_t* lane) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lane)));
  }
  static Lanes lanes(uint32_t bits) { return static_cast<Lanes>(bits); }
  static Reg permute(Reg r, Index i) { return _mm512_permutexvar_ps(i, r); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm512_maskz_loadu_ps(some, p); }
  static void store_lanes(float* p, Lanes some, Reg r) { _mm512_mask_storeu_ps(p, some, r); }
  static Reg load_lanes(const Bf16* p, Lanes some) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
  }
  static void store_lanes(Bf16* p, Lanes some, Reg r) { _mm256_mask_storeu_epi16(p, some, avx512::Vec{r}.to_bf16()); }
  static Reg curve(Reg r, const Epilogue& e) { return activated(r, e); }

  static void store_mask(float* p, Lanes some) { _mm512_store_si512(p, _mm512_maskz_set1_epi32(some, -1)); }
  static Reg masked(Reg r, const float* mask) { return _mm512_and_ps(r, _mm512_load_ps(mask)); }

  static Reg gather(const float* p, Index i) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(p), i, _mm512_loadu_ps(p + 16));
  }
  static Reg gather4(const float* p, Index i) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_slli_epi32(i, 26)), gather(p, i), gather(p + 32, i));
  }
  // Lane n from the n-th place of the second run where it lies behind the first.
  static Lanes behind(Index i) {
    return _mm512_cmpgt_epi32_mask(i, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static Reg two_runs(const float* first, const float* second, Index i) {
    return _mm512_mask_loadu_ps(_mm512_loadu_ps(first), behind(i), second);
  }
  static Reg load_runs(const float* first, const float* second, Lanes some, Lanes behind) {
    const Reg r = _mm512_maskz_loadu_ps(static_cast<Lanes>(some & ~behind), first);
    return _mm512_mask_loadu_ps(r, static_cast<Lanes>(some & behind), second);
  }
  static Reg alternate(const float* p) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return gather(p, even);
  }
  static Reg fourth(const float* p) {
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    return gather4(p, places);
  }

  // Four rows make one vector by loads that merge, which two ports share; shuffles have one.
  static void transpose(const float* sums, int64_t stride, float (&out)[16][16]) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Reg r[4];  // 128-bit lane L holds filters 4 q to 4 q + 3 of pixel 4 L + i
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* const p = sums + i * stride + 4 * q;
        const Reg two =
            _mm512_mask_broadcast_f32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), 0x00F0, _mm_loadu_ps(p + 4 * stride));
        const Reg three = _mm512_mask_broadcast_f32x4(two, 0x0F00, _mm_loadu_ps(p + 8 * stride));
        r[i] = _mm512_mask_broadcast_f32x4(three, 0xF000, _mm_loadu_ps(p + 12 * stride));
      }
      const Reg low0 = _mm512_unpacklo_ps(r[0], r[1]), low1 = _mm512_unpacklo_ps(r[2], r[3]);
      const Reg high0 = _mm512_unpackhi_ps(r[0], r[1]), high1 = _mm512_unpackhi_ps(r[2], r[3]);
      _mm512_store_ps(out[4 * q], _mm512_shuffle_ps(low0, low1, 0x44));
      _mm512_store_ps(out[4 * q + 1], _mm512_shuffle_ps(low0, low1, 0xEE));
      _mm512_store_ps(out[4 * q + 2], _mm512_shuffle_ps(high0, high1, 0x44));
      _mm512_store_ps(out[4 * q + 3], _mm512_shuffle_ps(high0, high1, 0xEE));
    }
  }
};

template <From F, bool kPast = false>
constexpr void fill_panel(PanelKernel (&kernels)[kFrom][kMaxVectors]) {
  auto& row = kernels[static_cast<int>(F)];
  row[0] = &panel<Vec16, F, 8, 4, 1, kPast>;
  row[1] = &panel<Vec16, F, 8, 4, 2, kPast>;
  row[2] = &panel<Vec16, F, 8, 4, 3, kPast>;
}

// Blocks of 4 filters each read other taps, so x comes from L2: in longer runs, of which fewer lines are read twice.
template <bool kPast>
constexpr void fill_narrow(PanelKernel (&kernels)[kFrom][kMaxVectors]) {
  auto& row = kernels[static_cast<int>(From::kPlanes)];
  row[3] = &panel<Vec16, From::kPlanes, 4, 0, 4, kPast>;
  row[4] = &panel<Vec16, From::kPlanes, 4, 0, 5, kPast>;
  row[5] = &panel<Vec16, From::kPlanes, 4, 0, 6, kPast>;
}

// Cycles measured on an Intel Xeon.
constexpr GemmCompact make() {
  GemmCompact g{.isa = "avx512",
                .lanes = 16,
                .pixels = {{8, 8, 8, 6}, {8}, {8}},
                .nr = 3,
                .nv = {4, 1, 1},
                .nr_narrow = 6,
                .filters_cycles = {{7, 11.5, 13, 12.7}, {6}, {6}},
                .planes_cycles = {3.75, 5, 7, 9, 11, 13},
                .planes_call = 60,
                .filters_kernel = {},
                .panel_rows = {8, 8, 8, 4, 4, 4},
                .panel_cycles = {3.75, 5, 7},
                .panel_taps = 200,
                .collect_cycles = {3, 4.7, 9.2, 4.5, 4.7, 9.2},
                .mask_cycles = {0, 3, 3, 0, 3, 3},
                .store_cycles = {3, 8, 16},
                .spread = &spread<Vec16>,
                .spread_bf16 = &spread<Vec16, Bf16>};
  fill_collect<Vec16, 3>(g);
  fill_panel<From::kCopy>(g.panel_kernel);
  fill_panel<From::kSlots>(g.panel_kernel);
  fill_panel<From::kPlanes>(g.panel_kernel);
  fill_panel<From::kCopy, true>(g.panel_past_caches);
  fill_panel<From::kPlanes, true>(g.panel_past_caches);
  fill_narrow<false>(g.panel_kernel);
  fill_narrow<true>(g.panel_past_caches);
  fill_filters<Vec16, 16, 1>(g.filters_kernel[0][0], upto<8>());
  fill_filters<Vec16, 16, 2>(g.filters_kernel[0][1], upto<8>());
  fill_filters<Vec16, 16, 3>(g.filters_kernel[0][2], upto<8>());
  fill_filters<Vec16, 16, 4>(g.filters_kernel[0][3], upto<6>());
  fill_filters<Vec8, 8, 1>(g.filters_kernel[1][0], upto<8>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<8>());
  return g;
}

// Where one unit runs a multiply-add in two halves, that is all that counts.
constexpr GemmCompact on_zen4(GemmCompact g) {
  constexpr double kWide[kMaxVectors] = {8.6, 16.5, 24.6, 32.8, 41, 49.2};
  for (int v = 0; v < kMaxVectors; ++v) g.planes_cycles[v] = g.panel_cycles[v] = kWide[v] / 2;
  for (int v = 0; v < 3; ++v) g.filters_cycles[0][v] = kWide[v];
  g.filters_cycles[0][3] = 24.6;
  g.filters_cycles[1][0] = 8.6;
  g.panel_taps = 160;
  return g;
}

constexpr GemmCompact on_zen5(GemmCompact g) {
  constexpr double kFilters[] = {6.2, 8.1, 12.1, 12.5}, kPanel[kMaxVectors] = {2.4, 4.1, 6, 8.2, 10.2, 12.2};
  for (int v = 0; v < 4; ++v) g.filters_cycles[0][v] = kFilters[v];
  for (int v = 0; v < kMaxVectors; ++v) g.planes_cycles[v] = g.panel_cycles[v] = kPanel[v];
  g.filters_cycles[1][0] = g.filters_cycles[2][0] = 6.4;
  g.rest_cycles[0] = 4, g.rest_cycles[1] = 0.5;
  g.together_cycles[0] = 1.1, g.together_cycles[1] = 0.55;
  g.rest_call = 200;
  g.slots = 1.2;
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_avx512 = make();
extern constinit const GemmCompact gemm_compact_avx512_zen4 = on_zen4(make());
extern constinit const GemmCompact gemm_compact_avx512_zen5 = on_zen5(make());

}  // namespace structadmm::kernels
