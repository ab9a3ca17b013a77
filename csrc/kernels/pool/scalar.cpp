#include "kernels/pool/isa_tables.h"
#include "simd/activate.h"
#include "simd/pixels_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::scalar;
using scalar::Vec;

#include "kernels/pool/generic.h"

}  // namespace

extern constinit const PoolKernels pool_scalar = make("scalar");

}  // namespace structadmm::kernels
