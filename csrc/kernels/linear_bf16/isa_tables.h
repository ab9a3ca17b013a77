// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/linear_bf16/linear_bf16.h"

namespace structadmm::kernels {

extern const LinearBf16 linear_bf16_scalar;
#if SADMM_X86
extern const LinearBf16 linear_bf16_avx2, linear_bf16_avx512, linear_bf16_avx512_bf16, linear_bf16_amx_bf16;
#endif

}  // namespace structadmm::kernels
