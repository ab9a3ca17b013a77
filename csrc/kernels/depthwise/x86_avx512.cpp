#include "kernels/depthwise/isa_tables.h"
#include "simd/activate.h"
#include "simd/pixels_avx512.h"
#include "simd/pixels_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::avx512;
using avx512::Vec;

#include "kernels/depthwise/generic.h"

}  // namespace

extern constinit const Depthwise depthwise_avx512 = make("avx512");

}  // namespace structadmm::kernels
