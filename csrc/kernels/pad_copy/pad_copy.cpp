#include "kernels/pad_copy/isa_kernels.h"
#include "kernels/select.h"

namespace structadmm::kernels {

PadCopyKernel pad_copy(Isa isa) {
  static constexpr IsaRow<PadCopyKernel> kRows[] = {
      {Isa::kScalar, pad_copy_f32__scalar},
#if SADMM_X86
      {Isa::kAvx2, pad_copy_f32__avx2},
      {Isa::kAvx512, pad_copy_f32__avx512},
#endif
  };
  return select_row(kRows, isa);
}

}  // namespace structadmm::kernels
