// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/winograd/winograd.h"

namespace structadmm::kernels {

extern const Winograd winograd_scalar;
#if SADMM_X86
extern const Winograd winograd_avx2, winograd_avx512;
#endif

}  // namespace structadmm::kernels
