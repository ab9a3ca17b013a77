#include "kernels/linear_bf16/linear_bf16.h"

#include "kernels/linear_bf16/isa_tables.h"

namespace structadmm::kernels {

const LinearBf16& linear_bf16(Isa isa) {
#if SADMM_X86
  if (isa == Isa::kAmxBf16) return linear_bf16_amx_bf16;
  if (isa == Isa::kAvx512Bf16) return linear_bf16_avx512_bf16;
  if (isa == Isa::kAvx512) return linear_bf16_avx512;
  if (isa == Isa::kAvx2) return linear_bf16_avx2;
#endif
  (void)isa;
  return linear_bf16_scalar;
}

}  // namespace structadmm::kernels
