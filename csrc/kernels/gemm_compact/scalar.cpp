// The baseline of the platform: vectors of four through the compiler, multiply and add rounded separately.
#include <type_traits>
#include <utility>

#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_compact/generic.h"
#include "kernels/gemm_compact/panel.h"

struct Vec4 {
  typedef float Reg __attribute__((vector_size(16)));
  using Index = const int8_t*;
  using Lanes = uint32_t;
  using Across = Vec4;
  static constexpr int kLanes = 4;
  static constexpr int kRun = 1;
  static constexpr bool kMasks = true;

  static Reg load(const float* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static Reg broadcast(const float* p) { return Reg{*p, *p, *p, *p}; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg low, Reg r) { return low > r ? low : r; }
  static Reg min(Reg high, Reg r) { return high < r ? high : r; }
  static void store(float* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }

  static Index index(const int8_t* lane) { return lane; }
  static Lanes lanes(uint32_t bits) { return bits; }
  static Reg permute(Reg r, Index i) { return Reg{r[i[0] & 3], r[i[1] & 3], r[i[2] & 3], r[i[3] & 3]}; }
  static Reg load_lanes(const float* p, Lanes some) {
    Reg r{};
    for (int i = 0; i < kLanes; ++i) {
      if (some >> i & 1) r[i] = p[i];
    }
    return r;
  }
  static void store_lanes(float* p, Lanes some, Reg r) {
    if (some == 0xF) return store(p, r);
    for (int i = 0; i < kLanes; ++i) {
      if (some >> i & 1) p[i] = r[i];
    }
  }
  static Reg curve(Reg r, const Epilogue& e) {
    float lanes[ActiveVec::kWidth] = {};
    store(lanes, r);
    activate(ActiveVec::load(lanes), e).store(lanes);
    return load(lanes);
  }
  static void transpose(const float* sums, int64_t stride, float (&out)[4][4]) { transpose_plainly(sums, stride, out); }
};

constexpr GemmCompact make() {
  GemmCompact g{.isa = "scalar",
                .lanes = 4,
                .pixels = {{2}, {2}, {2}},
                .nr = 2,
                .nv = {1, 1, 1},
                .filters_cycles = {{9}, {6}, {4}},
                .planes_cycles = {5, 9},
                .filters_kernel = {},
                .panel_rows = {4, 4},
                .spread = &spread<Vec4>};
  auto& planes = g.panel_kernel[static_cast<int>(From::kPlanes)];
  planes[0] = &panel<Vec4, From::kPlanes, 4, 0, 1>;
  planes[1] = &panel<Vec4, From::kPlanes, 4, 0, 2>;
  fill_filters<Vec4, 16, 1>(g.filters_kernel[0][0], upto<2>());
  fill_filters<Vec4, 8, 1>(g.filters_kernel[1][0], upto<2>());
  fill_filters<Vec4, 4, 1>(g.filters_kernel[2][0], upto<2>());
  return g;
}

}  // namespace

extern constinit const GemmCompact gemm_compact_scalar = make();

}  // namespace structadmm::kernels
