#include "kernels/pad_copy/isa_kernels.h"

namespace structadmm::kernels {
namespace {

#include "kernels/pad_copy/generic.h"

struct Vec1 {
  static constexpr int kLanes = 1;
  static float zero() { return 0.0f; }
  static bool first(int64_t n) { return n > 0; }
  static float load(const float* p) { return *p; }
  static float load(const float* p, bool some) { return some ? *p : 0.0f; }
  static float load_even(const float* p, bool low, bool) { return low ? *p : 0.0f; }
  static float load_fourth(const float* p) { return *p; }
  static void store(float* p, float r) { *p = r; }
};

}  // namespace

void pad_copy_f32__scalar(const PadCopyArgs& a) {
  pad_copy_f32<Vec1>(a);
}

}  // namespace structadmm::kernels
