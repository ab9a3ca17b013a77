#include "kernels/linear_bf16/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

using avx512::Vec;

#include "kernels/linear_bf16/dot_bf16.h"
#include "kernels/linear_bf16/generic.h"

}  // namespace

extern constinit const LinearBf16 linear_bf16_avx512_bf16 = make("avx512_bf16");

}  // namespace structadmm::kernels
