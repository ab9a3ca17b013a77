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

#include "kernels/gemm_compact/panel.h"

__attribute__((noinline)) __m256 activated(__m256 r, const Epilogue& e) {
  return activate(ActiveVec{r}, e).v;
}

struct Vec8 {
  using Reg = __m256;
  using Index = __m256i;
  using Lanes = __m256i;
  using Across = Vec8;
  static constexpr int kLanes = 8;
  static constexpr int kRun = 2;
  static constexpr bool kMasks = false;  // microcoded on AMD before Zen 4: a dozen cycles each

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
  static Lanes lanes_from(int n) {
    return _mm256_cmpgt_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(n - 1));
  }
  // Lane i from i below n, otherwise from i - gap.
  static Index index_with_gap(int n, int gap) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_sub_epi32(lane, _mm256_and_si256(lanes_from(n), _mm256_set1_epi32(gap)));
  }
  static Reg blend(Reg low, Reg high, Lanes from_high) {
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(from_high));
  }
  static void store_mask(float* p, Lanes some) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), some); }
  static Reg masked(Reg r, const float* mask) { return _mm256_and_ps(r, _mm256_load_ps(mask)); }
  static Reg permute(Reg r, Index i) { return _mm256_permutevar8x32_ps(r, i); }
  static Reg load_lanes(const float* p, Lanes some) { return _mm256_maskload_ps(p, some); }
  static Reg only(Reg r, Lanes some) { return _mm256_and_ps(r, _mm256_castsi256_ps(some)); }
  // Calls run with a function that stores the first n lanes: two halves that overlap, where there is no whole vector.
  template <class Run>
  static void with_store(int n, const Run& run) {
    const auto last = [n](Reg r, int lanes) {
      const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(n - lanes), _mm256_setr_epi32(0, 1, 2, 3, 0, 0, 0, 0));
      return _mm256_castps256_ps128(_mm256_permutevar8x32_ps(r, at));
    };
    if (n == 8) {
      run([](float* p, Reg r) { _mm256_storeu_ps(p, r); });
    } else if (n >= 4) {
      run([=](float* p, Reg r) {
        _mm_storeu_ps(p, _mm256_castps256_ps128(r));
        _mm_storeu_ps(p + n - 4, last(r, 4));
      });
    } else if (n >= 2) {
      run([=](float* p, Reg r) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), _mm256_castps256_ps128(r));
        _mm_storel_pi(reinterpret_cast<__m64*>(p + n - 2), last(r, 2));
      });
    } else {
      run([](float* p, Reg r) { _mm_store_ss(p, _mm256_castps256_ps128(r)); });
    }
  }
  static Reg curve(Reg r, const Epilogue& e) { return activated(r, e); }

  // Lanes below 8 from the first vector, the others from the second. `i` holds lanes of two vectors.
  static Reg gather(const float* p, Index i) {
    const Reg second = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(p), i), _mm256_permutevar8x32_ps(load(p + 8), i), second);
  }
  static Reg gather4(const float* p, Index i) {
    return _mm256_blendv_ps(gather(p, i), gather(p + 16, i), _mm256_castsi256_ps(_mm256_slli_epi32(i, 27)));
  }

  // Lane n from the n-th place of the second run, where `i` says that it lies behind the first.
  static Reg two_runs(const float* first, const float* second, Index i) {
    return blend(load(first), load(second), _mm256_cmpgt_epi32(i, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
  // Loaded in such halves that shuffles within 128 bits put them in order.
  static Reg halves(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
  static Reg alternate(const float* p) { return _mm256_shuffle_ps(halves(p, p + 8), halves(p + 4, p + 12), 0x88); }
  static Reg fourth(const float* p) {
    const Reg even = _mm256_unpacklo_ps(halves(p, p + 16), halves(p + 4, p + 20)),
              odd = _mm256_unpacklo_ps(halves(p + 8, p + 24), halves(p + 12, p + 28));
    return _mm256_shuffle_ps(even, odd, 0x44);
  }

  // Four filters of eight pixels. Halves of two rows make one vector by loads that insert; what is left are shuffles
  // within 128 bits.
  static void transpose(const float* sums, int64_t stride, Reg (&out)[4]) {
    Reg r[4];  // 128-bit lane L holds the filters of pixel 4 L + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* const p = sums + i * stride;
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
    }
    const Reg low0 = _mm256_unpacklo_ps(r[0], r[1]), low1 = _mm256_unpacklo_ps(r[2], r[3]);
    const Reg high0 = _mm256_unpackhi_ps(r[0], r[1]), high1 = _mm256_unpackhi_ps(r[2], r[3]);
    out[0] = _mm256_shuffle_ps(low0, low1, 0x44);
    out[1] = _mm256_shuffle_ps(low0, low1, 0xEE);
    out[2] = _mm256_shuffle_ps(high0, high1, 0x44);
    out[3] = _mm256_shuffle_ps(high0, high1, 0xEE);
  }
  static void transpose(const float* sums, int64_t stride, float (&out)[8][8]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Reg r[4];
      transpose(sums + 4 * half, stride, r);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm256_store_ps(out[4 * half + i], r[i]);
    }
  }
};

struct Vec4 {
  using Reg = __m128;
  using Across = Vec8;
  static constexpr int kLanes = 4;
  static constexpr int kRun = 2;
  static Reg load(const float* p) { return _mm_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm_storeu_ps(p, r); }
};

// Written out: twelve sums, three vectors of x and a weight take all registers, and with two taps in its loop the
// compiler spills some. The sums are operands 0 to 11, filter by filter. The compiler is not told of the memory that is
// read: nothing in panel() writes to x, a copy or weights.
// clang-format off
#define SADMM_FILTER(w, s0, s1, s2)          \
  "vbroadcastss " w ", %%ymm15\n\t"          \
  "vfmadd231ps %%ymm12, %%ymm15, " s0 "\n\t" \
  "vfmadd231ps %%ymm13, %%ymm15, " s1 "\n\t" \
  "vfmadd231ps %%ymm14, %%ymm15, " s2 "\n\t"
#define SADMM_TAP(x0, x1, x2, w)           \
  "vmovups " x0 ", %%ymm12\n\t"            \
  "vmovups " x1 ", %%ymm13\n\t"            \
  "vmovups " x2 ", %%ymm14\n\t"            \
  SADMM_FILTER("0" w, "%0", "%1", "%2")    \
  SADMM_FILTER("4" w, "%3", "%4", "%5")    \
  SADMM_FILTER("8" w, "%6", "%7", "%8")    \
  SADMM_FILTER("12" w, "%9", "%10", "%11")
#define SADMM_SUM(taps, ...)                                                                                  \
  __m256 s0 = sum[0][0], s1 = sum[0][1], s2 = sum[0][2], s3 = sum[1][0], s4 = sum[1][1], s5 = sum[1][2],      \
         s6 = sum[2][0], s7 = sum[2][1], s8 = sum[2][2], s9 = sum[3][0], s10 = sum[3][1], s11 = sum[3][2];    \
  asm volatile(taps                                                                                           \
      : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9),   \
        "+x"(s10), "+x"(s11)                                                                                  \
      : __VA_ARGS__                                                                                           \
      : "ymm12", "ymm13", "ymm14", "ymm15");                                                                  \
  sum[0][0] = s0, sum[0][1] = s1, sum[0][2] = s2, sum[1][0] = s3, sum[1][1] = s4, sum[1][2] = s5;             \
  sum[2][0] = s6, sum[2][1] = s7, sum[2][2] = s8, sum[3][0] = s9, sum[3][1] = s10, sum[3][2] = s11

template <>
struct Taps<Vec8, 4, 3> {
  using Sums = __m256[4][3];
  static constexpr int kRun = Vec8::kRun;
  static_assert(kRun == 2);
  static void one(Sums& sum, const float* const (&x)[3], int64_t at, const float* w) {
    SADMM_SUM(SADMM_TAP("(%[x0],%[at],4)", "(%[x1],%[at],4)", "(%[x2],%[at],4)", "(%[w])"),
              [x0] "r"(x[0]), [x1] "r"(x[1]), [x2] "r"(x[2]), [at] "r"(at), [w] "r"(w));
  }
  static void run(Sums& sum, const float* x, const float* w, int64_t w_stride) {
    SADMM_SUM(SADMM_TAP("(%[x])", "32(%[x])", "64(%[x])", "(%[w])")
              SADMM_TAP("96(%[x])", "128(%[x])", "160(%[x])", "(%[w],%[w_stride],4)"),
              [x] "r"(x), [w] "r"(w), [w_stride] "r"(w_stride));
  }
};
#undef SADMM_SUM
#undef SADMM_TAP
#undef SADMM_FILTER
// clang-format on

template <From F>
constexpr void fill_panel(GemmCompact& g) {
  auto& row = g.panel_kernel[static_cast<int>(F)];
  row[0] = &panel<Vec8, F, 8, 4, 1>;
  row[1] = &panel<Vec8, F, 6, 4, 2>;
  row[2] = &panel<Vec8, F, 4, 0, 3>;
}

constexpr GemmCompact make() {
  GemmCompact g{.isa = "avx2",
                .lanes = 8,
                .pixels = {{6, 1, 1, 1}, {6}, {6}},
                .nr = 3,
                .nv = {1, 1, 1},
                .filters_cycles = {{9}, {6.5}, {6.5}},
                .planes_cycles = {2.8, 5, 7.2},
                .planes_call = 80,
                .pointwise = 1.3,
                .far = 1.15,
                .many = 1.2,
                .filters_kernel = {},
                .panel_rows = {8, 6, 4},
                .panel_cycles = {2.6, 4.3, 6.2},
                .panel_taps = 512,
                .collect_cycles = {2.6, 4.8, 8.4, 3.4, 4.1, 5},
                .mask_cycles = {1.3, 1, 1.2, 1.6, 1.4, 1.4},
                .store_cycles = {2, 8, 5},
                .copy_cycles = 200,
                .rest_cycles = {4.2, 1.1},
                .together_cycles = {2.9, 2.9},
                .slots = 1.2,
                .collect = {},
                .panel_kernel = {},
                .spread = &spread<Vec8>};
  fill_collect<Vec8, 3>(g);
  fill_panel<From::kCopy>(g);
  fill_panel<From::kSlots>(g);
  fill_panel<From::kPlanes>(g);
  fill_filters<Vec8, 16, 1>(g.filters_kernel[0][0], upto<6>());
  fill_filters<Vec8, 16, 2>(g.filters_kernel[0][1], upto<1>());
  fill_filters<Vec8, 16, 3>(g.filters_kernel[0][2], upto<1>());
  fill_filters<Vec8, 16, 4>(g.filters_kernel[0][3], upto<1>());
  fill_filters<Vec8, 8, 1>(g.filters_kernel[1][0], upto<6>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<6>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_avx2 = make();

}  // namespace structadmm::kernels
