#include "kernels/pool/pool.h"

#include "kernels/pool/isa_tables.h"

namespace structadmm::kernels {

const PoolKernels& pool_kernels(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) return pool_avx512;
  if (isa == Isa::kAvx2) return pool_avx2;
#endif
  (void)isa;
  return pool_scalar;
}

}  // namespace structadmm::kernels
