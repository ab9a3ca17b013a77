#include "kernels/gemm_compact/gemm_compact.h"
#include <cstdlib>
#include "kernels/gemm_compact/isa_tables.h"
#include "kernels/select.h"

namespace structadmm::kernels {

const GemmCompact& gemm_compact(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) {
    switch (core512()) {
      case Core512::kZen4:
        return gemm_compact_avx512_zen4;
      case Core512::kZen5: {
        static const GemmCompact g = [] {
          GemmCompact g = gemm_compact_avx512_zen5;
          const auto num = [](const char* n, double& v) {
            if (const char* e = getenv(n)) v = atof(e);
          };
          const auto list = [](const char* n, double* v, int k) {
            if (const char* e = getenv(n))
              for (int i = 0; i < k; ++i) {
                v[i] = strtod(e, const_cast<char**>(&e));
                ++e;
              }
          };
          num("K_POINT", g.pointwise);
          num("K_FAR", g.far);
          num("K_MANY", g.many);
          num("K_CALL", g.planes_call);
          list("K_PC", g.panel_cycles, 3);
          list("K_PX", g.planes_cycles, 3);
          list("K_STORE", g.store_cycles, 3);
          num("K_COPY", g.copy_cycles);
          list("K_REST", g.rest_cycles, 2);
          list("K_TOG", g.together_cycles, 2);
          num("K_RC", g.rest_call);
          num("K_SLOTS", g.slots);
          list("K_COLLECT", g.collect_cycles, 6);
          list("K_MASK", g.mask_cycles, 6);
          double pt = g.panel_taps;
          num("K_PT", pt);
          g.panel_taps = pt;
          list("K_FIL", g.filters_cycles[0], 4);
          return g;
        }();
        return g;
      }
      case Core512::kIntel:
        break;
    }
  }
#endif
  static constexpr IsaRow<const GemmCompact*> kRows[] = {
      {Isa::kScalar, &gemm_compact_scalar},
#if SADMM_X86
      {Isa::kAvx2, &gemm_compact_avx2},
      {Isa::kAvx512, &gemm_compact_avx512},
#endif
  };
  return *select_row(kRows, isa);
}

}  // namespace structadmm::kernels
