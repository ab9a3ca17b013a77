#include "kernels/conv_nonzeros/conv_nonzeros.h"

#include "kernels/conv_nonzeros/isa_tables.h"

namespace structadmm::kernels {

const ConvNonzeros& conv_nonzeros(Isa isa) {
#if SADMM_X86
  if (isa >= Isa::kAvx512) return core512() == Core512::kZen5 ? conv_nonzeros_avx512_zen5 : conv_nonzeros_avx512;
  if (isa == Isa::kAvx2) return conv_nonzeros_avx2;
#endif
  (void)isa;
  return conv_nonzeros_scalar;
}

}  // namespace structadmm::kernels
