// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/gemm_compact/gemm_compact.h"

namespace structadmm::kernels {

extern const GemmCompact gemm_compact_scalar;
#if SADMM_X86
extern const GemmCompact gemm_compact_avx2, gemm_compact_avx512, gemm_compact_avx512_zen4, gemm_compact_avx512_zen5;
#endif

}  // namespace structadmm::kernels
