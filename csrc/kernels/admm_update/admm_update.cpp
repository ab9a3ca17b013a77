#include "kernels/admm_update/admm_update.h"

#include "kernels/select.h"

namespace structadmm {

#define SADMM_KERNEL(dtype, isa) extern const AdmmUpdateKernel kAdmmUpdate_##dtype##__##isa;
#include "kernels/admm_update/kernels.inc"
#undef SADMM_KERNEL

namespace {

constexpr const AdmmUpdateKernel* kTable[] = {
#define SADMM_KERNEL(dtype, isa) &kAdmmUpdate_##dtype##__##isa,
#include "kernels/admm_update/kernels.inc"
#undef SADMM_KERNEL
};

}  // namespace

const AdmmUpdateKernel& select_admm_update(Isa isa, Dtype dtype) {
  return select_kernel("admm_update", kTable, isa, dtype);
}

}  // namespace structadmm
