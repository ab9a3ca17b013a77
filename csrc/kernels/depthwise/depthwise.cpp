#include "kernels/depthwise/depthwise.h"

#include "kernels/depthwise/isa_tables.h"

namespace structadmm::kernels {

const Depthwise& depthwise(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) return depthwise_avx512;
  if (isa == Isa::kAvx2) return depthwise_avx2;
#endif
  (void)isa;
  return depthwise_scalar;
}

}  // namespace structadmm::kernels
