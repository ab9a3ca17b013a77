// One table per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/rows/rows.h"

namespace structadmm::kernels {

extern const RowsKernels rows_scalar;
#if SADMM_X86
extern const RowsKernels rows_avx2, rows_avx512;
#endif

}  // namespace structadmm::kernels
