#include "kernels/rows/rows.h"

#include "kernels/rows/isa_tables.h"

namespace structadmm::kernels {

const RowsKernels& rows_kernels(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) return rows_avx512;
  if (isa == Isa::kAvx2) return rows_avx2;
#endif
  (void)isa;
  return rows_scalar;
}

}  // namespace structadmm::kernels
