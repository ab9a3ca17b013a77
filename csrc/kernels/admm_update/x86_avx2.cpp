#include "kernels/admm_update/admm_update.h"
#include "simd/vec_avx2.h"

namespace structadmm {
namespace {
namespace avx2 {
#include "kernels/admm_update/generic.h"
}  // namespace avx2
}  // namespace

extern const AdmmUpdateKernel kAdmmUpdate_f32__avx2 = {"admm_update_f32__avx2", Isa::kAvx2, Dtype::kF32,
                                                       avx2::update<float>, avx2::penalty<float>};
extern const AdmmUpdateKernel kAdmmUpdate_bf16__avx2 = {"admm_update_bf16__avx2", Isa::kAvx2, Dtype::kBf16,
                                                        avx2::update<Bf16>, avx2::penalty<Bf16>};
extern const AdmmUpdateKernel kAdmmUpdate_f16__avx2 = {"admm_update_f16__avx2", Isa::kAvx2, Dtype::kF16,
                                                       avx2::update<F16>, avx2::penalty<F16>};

}  // namespace structadmm
