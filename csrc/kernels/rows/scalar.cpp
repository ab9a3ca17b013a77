#include "kernels/rows/isa_tables.h"
#include "simd/activate.h"
#include "simd/pixels_scalar.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::scalar;
using scalar::Vec;

#include "kernels/rows/generic.h"

}  // namespace

extern constinit const RowsKernels rows_scalar = make("scalar");

}  // namespace structadmm::kernels
