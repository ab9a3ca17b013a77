#include "kernels/depthwise/isa_tables.h"
#include "simd/activate.h"
#include "simd/pixels_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::scalar;
using scalar::Vec;

#include "kernels/depthwise/generic.h"

}  // namespace

extern constinit const Depthwise depthwise_scalar = make("scalar");

}  // namespace structadmm::kernels
