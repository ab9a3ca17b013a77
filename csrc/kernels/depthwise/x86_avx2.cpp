#include "kernels/depthwise/isa_tables.h"
#include "simd/activate.h"
#include "simd/pixels_avx2.h"
#include "simd/pixels_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::avx2;
using avx2::Vec;

#include "kernels/depthwise/generic.h"

}  // namespace

extern constinit const Depthwise depthwise_avx2 = make("avx2");

}  // namespace structadmm::kernels
