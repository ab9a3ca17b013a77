#include <immintrin.h>

#include "kernels/pad_copy/isa_kernels.h"

namespace structadmm::kernels {
namespace {

#include "kernels/pad_copy/generic.h"

struct Vec16 {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static Reg zero() { return _mm512_setzero_ps(); }
  static __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
  static Reg load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  // The last of n even elements is the last that may be read, so 2n - 1 are.
  static Reg load_even(const float* p, int64_t n) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Reg a = _mm512_maskz_loadu_ps(first(2 * n - 1), p), b = _mm512_maskz_loadu_ps(first(2 * n - 17), p + 16);
    return _mm512_permutex2var_ps(a, even, b);
  }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
};

}  // namespace

void pad_copy_f32__avx512(const PadCopyArgs& a) {
  pad_copy_f32<Vec16>(a);
}

}  // namespace structadmm::kernels
