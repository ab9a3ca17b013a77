#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"
#include "kernels/select.h"

namespace structadmm::kernels {

const GemmCompact& gemm_compact(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) {
    switch (core512()) {
      case Core512::kZen4:
        return gemm_compact_avx512_zen4;
      case Core512::kZen5:
        return gemm_compact_avx512_zen5;
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
