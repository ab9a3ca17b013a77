#include "kernels/linear_bf16/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

using scalar::Vec;

struct Dot {
  struct Weights {
    Vec first, second;
  };
  struct Pixels {
    float first, second;
  };
  static constexpr int kTiles = 2;

  static Weights weights(const Bf16* p) {
    Weights w;
    for (int i = 0; i < Vec::kWidth; ++i) {
      w.first.a[i] = scalar::to_float(p[2 * i]);
      w.second.a[i] = scalar::to_float(p[2 * i + 1]);
    }
    return w;
  }
  static Pixels pixels(uint32_t pair) {
    return {scalar::to_float(Bf16{static_cast<uint16_t>(pair)}),
            scalar::to_float(Bf16{static_cast<uint16_t>(pair >> 16)})};
  }
  // A product of two bf16 is exact in f32, so this is the fused multiply-add of the others, without a call of fmaf.
  static Vec add(Vec sum, const Weights& w, const Pixels& x) {
    for (int i = 0; i < Vec::kWidth; ++i) {
      sum.a[i] += w.first.a[i] * x.first;
      sum.a[i] += w.second.a[i] * x.second;
    }
    return sum;
  }
};

#include "kernels/linear_bf16/generic.h"

}  // namespace

extern constinit const LinearBf16 linear_bf16_scalar = make("scalar");

}  // namespace structadmm::kernels
