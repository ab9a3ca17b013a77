#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/isa_tables.h"

namespace structadmm::kernels {

const GemmCompact& gemm_compact(Isa isa) {
#if SADMM_X86
  if (isa == Isa::kAvx2) return gemm_compact_avx2;
  if (isa == Isa::kAvx512) return gemm_compact_avx512;
#endif
  (void)isa;
  return gemm_compact_scalar;
}

}  // namespace structadmm::kernels
