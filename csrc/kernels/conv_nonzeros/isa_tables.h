// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/conv_nonzeros/conv_nonzeros.h"

namespace structadmm::kernels {

extern const ConvNonzeros conv_nonzeros_scalar;
#if SADMM_X86
extern const ConvNonzeros conv_nonzeros_avx2, conv_nonzeros_avx512, conv_nonzeros_avx512_zen5;
#endif

}  // namespace structadmm::kernels
