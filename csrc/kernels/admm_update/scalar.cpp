#include "kernels/admm_update/admm_update.h"
#include "simd/vec_scalar.h"

namespace structadmm {
namespace {
namespace scalar {
#include "kernels/admm_update/generic.h"
}  // namespace scalar
}  // namespace

extern const AdmmUpdateKernel kAdmmUpdate_f32__scalar = {"admm_update_f32__scalar", Isa::kScalar, Dtype::kF32,
                                                         scalar::update<float>, scalar::penalty<float>};
extern const AdmmUpdateKernel kAdmmUpdate_bf16__scalar = {"admm_update_bf16__scalar", Isa::kScalar, Dtype::kBf16,
                                                          scalar::update<Bf16>, scalar::penalty<Bf16>};
extern const AdmmUpdateKernel kAdmmUpdate_f16__scalar = {"admm_update_f16__scalar", Isa::kScalar, Dtype::kF16,
                                                         scalar::update<F16>, scalar::penalty<F16>};

}  // namespace structadmm
