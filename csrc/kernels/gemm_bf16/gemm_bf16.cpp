#include "kernels/gemm_bf16/gemm_bf16.h"

#include "kernels/select.h"

namespace structadmm::kernels {

const GemmBf16& gemm_bf16(Isa isa) {
  static constexpr IsaRow<const GemmBf16*> kRows[] = {
      {Isa::kScalar, &gemm_bf16_scalar},
#if SADMM_X86
      {Isa::kAvx2, &gemm_bf16_avx2},
      {Isa::kAvx512, &gemm_bf16_avx512},
      {Isa::kAvx512Bf16, &gemm_bf16_avx512_bf16},
      {Isa::kAmxBf16, &gemm_bf16_amx_bf16},
#endif
  };
  return *select_row(kRows, isa);
}

}  // namespace structadmm::kernels
