#include "kernels/group_sumsq/group_sumsq.h"
#include "simd/vec_avx2.h"

namespace structadmm {
namespace {
namespace avx2 {
#include "kernels/group_sumsq/generic.h"
}  // namespace avx2
}  // namespace

extern const GroupSumsqKernel kGroupSumsq_f32__avx2 = {"group_sumsq_f32__avx2", Isa::kAvx2, Dtype::kF32,
                                                       avx2::columns<float>, avx2::row<float>};
extern const GroupSumsqKernel kGroupSumsq_bf16__avx2 = {"group_sumsq_bf16__avx2", Isa::kAvx2, Dtype::kBf16,
                                                        avx2::columns<Bf16>, avx2::row<Bf16>};
extern const GroupSumsqKernel kGroupSumsq_f16__avx2 = {"group_sumsq_f16__avx2", Isa::kAvx2, Dtype::kF16,
                                                       avx2::columns<F16>, avx2::row<F16>};

}  // namespace structadmm
