// AVX2 and FMA: 12 of 16 registers accumulate, as 4 filters x 3 vectors of 8 pixels, or 6 pixels x one panel of 16
// filters.
#include <immintrin.h>

#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"

struct Vec8 {
  using Reg = __m256;
  using Index = int;
  static constexpr int kLanes = 8;
  static constexpr uint32_t kAllLanes = 0xFF;
  template <int>
  static constexpr bool kTransposes = false;

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }

  // Through the stack: masked stores are microcoded on AMD.
  static void store_lanes(float* p, uint32_t lanes, Reg r) {
    alignas(32) float tile[8];
    _mm256_store_ps(tile, r);
    for (; lanes; lanes &= lanes - 1) *p++ = tile[__builtin_ctz(lanes)];
  }
};

struct Vec4 {
  using Reg = __m128;
  static constexpr int kLanes = 4;
  template <int>
  static constexpr bool kTransposes = false;
  static Reg load(const float* p) { return _mm_loadu_ps(p); }
  static Reg broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
  static void store(float* p, Reg r) { _mm_storeu_ps(p, r); }
};

constexpr GemmCompact make() {
  GemmCompact g{.isa = "avx2",
                .lanes = 8,
                .pixels = 6,
                .mr = {4, 4, 4},
                .nr = {3, 3, 3},
                .nv = {1, 1, 1},
                .gather = false,
                .pixels_cycles = {{4.5, 5, 7}, {4.5, 5, 7}, {4.5, 5, 7}},
                .filters_cycles = {{7}, {5}, {5}},
                .pixels_kernel = {},
                .filters_kernel = {}};
  for (auto& row : g.pixels_kernel[0]) fill_pixels<Vec8, 4, false>(row, upto<3>());
  fill_filters<Vec8, 16, 1>(g.filters_kernel[0][0], upto<6>());
  fill_filters<Vec8, 8, 1>(g.filters_kernel[1][0], upto<6>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<6>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_avx2 = make();

}  // namespace structadmm::kernels
