// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/pool/pool.h"

namespace structadmm::kernels {

extern const PoolKernels pool_scalar;
#if SADMM_X86
extern const PoolKernels pool_avx2, pool_avx512;
#endif

}  // namespace structadmm::kernels
