#include "kernels/winograd/winograd.h"

#include "kernels/winograd/isa_tables.h"

namespace structadmm::kernels {

const Winograd& winograd(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) return winograd_avx512;
  if (isa == Isa::kAvx2) return winograd_avx2;
#endif
  (void)isa;
  return winograd_scalar;
}

}  // namespace structadmm::kernels
