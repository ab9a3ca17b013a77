// One kernel per instruction set, each defined in the file of its name.
#pragma once

#include "kernels/pad_copy/pad_copy.h"

namespace structadmm::kernels {

void pad_copy_f32__scalar(const PadCopyArgs& a);
#if SADMM_X86
void pad_copy_f32__avx2(const PadCopyArgs& a);
void pad_copy_f32__avx512(const PadCopyArgs& a);
#endif

}  // namespace structadmm::kernels
