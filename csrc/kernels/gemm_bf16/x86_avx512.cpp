// AVX-512: 8 filters x 2 vectors of 16 pixels accumulate.
#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/generic.h"

}  // namespace

extern constinit const GemmBf16 gemm_bf16_avx512 = {"gemm_bf16_8x32__avx512", WeightLayout::kRows, run<8>};

}  // namespace structadmm::kernels
