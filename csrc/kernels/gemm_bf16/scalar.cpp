// The baseline of the platform: plain C++.
#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/generic.h"

}  // namespace

extern constinit const GemmBf16 gemm_bf16_scalar = {"gemm_bf16_2x32__scalar", WeightLayout::kRows, run<2>};

}  // namespace structadmm::kernels
