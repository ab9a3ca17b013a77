#include "kernels/group_sumsq/group_sumsq.h"
#include "simd/vec_avx512.h"

namespace structadmm {
namespace {
namespace avx512 {
#include "kernels/group_sumsq/generic.h"
}  // namespace avx512
}  // namespace

extern const GroupSumsqKernel kGroupSumsq_f32__avx512 = {"group_sumsq_f32__avx512", Isa::kAvx512, Dtype::kF32,
                                                         avx512::columns<float>, avx512::row<float>};
extern const GroupSumsqKernel kGroupSumsq_bf16__avx512 = {"group_sumsq_bf16__avx512", Isa::kAvx512, Dtype::kBf16,
                                                          avx512::columns<Bf16>, avx512::row<Bf16>};
extern const GroupSumsqKernel kGroupSumsq_f16__avx512 = {"group_sumsq_f16__avx512", Isa::kAvx512, Dtype::kF16,
                                                         avx512::columns<F16>, avx512::row<F16>};

}  // namespace structadmm
