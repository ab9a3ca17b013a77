#include <immintrin.h>

#include "kernels/pad_copy/isa_kernels.h"

namespace structadmm::kernels {
namespace {

#include "kernels/pad_copy/generic.h"

struct Vec8 {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static Reg zero() { return _mm256_setzero_ps(); }
  static __m256i first(int64_t n) {
    const int count = n < 0 ? 0 : n > 8 ? 8 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load_first(const float* p, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
  }
  // The last of n even elements is the last that may be read, so 2n - 1 are.
  static Reg load_even(const float* p, int64_t n) {
    const Reg a = _mm256_maskload_ps(p, first(2 * n - 1)), b = _mm256_maskload_ps(p + 8, first(2 * n - 9));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xD8));
  }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
};

}  // namespace

void pad_copy_f32__avx2(const PadCopyArgs& a) {
  pad_copy_f32<Vec8>(a);
}

}  // namespace structadmm::kernels
