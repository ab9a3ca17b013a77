#include "kernels/winograd/isa_tables.h"
#include "kernels/winograd/winograd_points.h"
#include "simd/vec_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::scalar;
using scalar::Vec;

// d[j] lane i = p[4 * i + j].
inline void deinterleave(const float* p, Vec (&d)[6]) {
  for (int j = 0; j < 6; ++j) {
    for (int i = 0; i < Vec::kWidth; ++i) d[j].a[i] = p[4 * i + j];
  }
}

#include "kernels/winograd/generic.h"

}  // namespace

extern constinit const Winograd winograd_scalar = {"scalar", Vec::kWidth, &transform_in<float>, &transform_out};

}  // namespace structadmm::kernels
