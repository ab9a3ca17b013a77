// AVX2: 2 filters x 4 vectors of 8 pixels accumulate.
#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/generic.h"

}  // namespace

extern constinit const GemmBf16 gemm_bf16_avx2 = {"gemm_bf16_2x32__avx2", WeightLayout::kRows, run<2>};

}  // namespace structadmm::kernels
