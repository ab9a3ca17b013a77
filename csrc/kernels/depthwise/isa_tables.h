// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/depthwise/depthwise.h"

namespace structadmm::kernels {

extern const Depthwise depthwise_scalar;
#if SADMM_X86
extern const Depthwise depthwise_avx2, depthwise_avx512;
#endif

}  // namespace structadmm::kernels
