#include "kernels/group_sumsq/group_sumsq.h"
#include "simd/vec_scalar.h"

namespace structadmm {
namespace {
namespace scalar {
#include "kernels/group_sumsq/generic.h"
}  // namespace scalar
}  // namespace

extern const GroupSumsqKernel kGroupSumsq_f32__scalar = {"group_sumsq_f32__scalar", Isa::kScalar, Dtype::kF32,
                                                         scalar::columns<float>, scalar::row<float>};
extern const GroupSumsqKernel kGroupSumsq_bf16__scalar = {"group_sumsq_bf16__scalar", Isa::kScalar, Dtype::kBf16,
                                                          scalar::columns<Bf16>, scalar::row<Bf16>};
extern const GroupSumsqKernel kGroupSumsq_f16__scalar = {"group_sumsq_f16__scalar", Isa::kScalar, Dtype::kF16,
                                                         scalar::columns<F16>, scalar::row<F16>};

}  // namespace structadmm
