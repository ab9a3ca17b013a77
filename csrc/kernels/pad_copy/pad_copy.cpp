#include "kernels/pad_copy/isa_kernels.h"

namespace structadmm::kernels {

PadCopyKernel pad_copy(Isa isa) {
#if SADMM_X86
  if (isa == Isa::kAvx2) return pad_copy_f32__avx2;
  if (isa == Isa::kAvx512) return pad_copy_f32__avx512;
#endif
  (void)isa;
  return pad_copy_f32__scalar;
}

}  // namespace structadmm::kernels
