// The baseline of the platform: vectors of four through the compiler, multiply and add rounded separately.
#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"

struct Vec4 {
  typedef float Reg __attribute__((vector_size(16)));
  using Index = int;
  static constexpr int kLanes = 4;
  static constexpr uint32_t kAllLanes = 0xF;
  template <int>
  static constexpr bool kTransposes = false;

  static Reg load(const float* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static Reg broadcast(const float* p) { return Reg{*p, *p, *p, *p}; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static void store(float* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  static void store_lanes(float* p, uint32_t lanes, Reg r) {
    for (; lanes; lanes &= lanes - 1) *p++ = r[__builtin_ctz(lanes)];
  }
};

constexpr GemmCompact make() {
  GemmCompact g{.isa = "scalar",
                .lanes = 4,
                .pixels = 2,
                .mr = {4, 4, 4},
                .nr = {2, 2, 2},
                .nv = {1, 1, 1},
                .gather = false,
                .pixels_cycles = {{5, 9}, {5, 9}, {5, 9}},
                .filters_cycles = {{9}, {6}, {4}},
                .pixels_kernel = {},
                .filters_kernel = {}};
  for (auto& row : g.pixels_kernel[0]) fill_pixels<Vec4, 4, false>(row, upto<2>());
  fill_filters<Vec4, 16, 1>(g.filters_kernel[0][0], upto<2>());
  fill_filters<Vec4, 8, 1>(g.filters_kernel[1][0], upto<2>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<2>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_scalar = make();

}  // namespace structadmm::kernels
