#include "kernels/admm_update/admm_update.h"
#include "simd/vec_avx512.h"

namespace structadmm {
namespace {
namespace avx512 {
#include "kernels/admm_update/generic.h"
}  // namespace avx512
}  // namespace

extern const AdmmUpdateKernel kAdmmUpdate_f32__avx512 = {"admm_update_f32__avx512", Isa::kAvx512, Dtype::kF32,
                                                         avx512::update<float>, avx512::penalty<float>};
extern const AdmmUpdateKernel kAdmmUpdate_bf16__avx512 = {"admm_update_bf16__avx512", Isa::kAvx512, Dtype::kBf16,
                                                          avx512::update<Bf16>, avx512::penalty<Bf16>};
extern const AdmmUpdateKernel kAdmmUpdate_f16__avx512 = {"admm_update_f16__avx512", Isa::kAvx512, Dtype::kF16,
                                                         avx512::update<F16>, avx512::penalty<F16>};

}  // namespace structadmm
