#include "kernels/group_sumsq/group_sumsq.h"

#include "kernels/select.h"

namespace structadmm {

#define SADMM_KERNEL(dtype, isa) extern const GroupSumsqKernel kGroupSumsq_##dtype##__##isa;
#include "kernels/group_sumsq/kernels.inc"
#undef SADMM_KERNEL

namespace {

constexpr const GroupSumsqKernel* kTable[] = {
#define SADMM_KERNEL(dtype, isa) &kGroupSumsq_##dtype##__##isa,
#include "kernels/group_sumsq/kernels.inc"
#undef SADMM_KERNEL
};

}  // namespace

const GroupSumsqKernel& select_group_sumsq(Isa isa, Dtype dtype) {
  return select_kernel("group_sumsq", kTable, isa, dtype);
}

}  // namespace structadmm
