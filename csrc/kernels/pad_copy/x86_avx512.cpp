#include <immintrin.h>

#include "kernels/pad_copy/isa_kernels.h"

namespace structadmm::kernels {
namespace {

#include "kernels/pad_copy/generic.h"

struct Vec16 {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static Reg zero() { return _mm512_setzero_ps(); }
  static __mmask16 first(int64_t n) { return n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }
  static Reg load_even(const float* p, __mmask16 low, __mmask16 high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(load(p, low), even, load(p + 16, high));
  }
  // Reads nothing behind the last that it wants.
  static Reg load_fourth(const float* p) {
    const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const Reg low = _mm512_permutex2var_ps(load(p), fourth, load(p + 16)),
              high = _mm512_permutex2var_ps(load(p + 32), fourth, load(p + 48, first(13)));
    return _mm512_mask_blend_ps(0xFF00, low, high);
  }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
};

}  // namespace

void pad_copy_f32__avx512(const PadCopyArgs& a) {
  pad_copy_f32<Vec16>(a);
}

}  // namespace structadmm::kernels
