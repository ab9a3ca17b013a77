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
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const float* p, __m256i some) { return _mm256_maskload_ps(p, some); }
  static Reg load_even(const float* p, __m256i low, __m256i high) {
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(load(p, low), load(p + 8, high), 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
  }
  // Reads nothing behind the last that it wants.
  static Reg load_fourth(const float* p) {
    const Reg low = _mm256_shuffle_ps(load(p), load(p + 8), 0x00),
              high = _mm256_shuffle_ps(load(p + 16), load(p + 24, first(5)), 0x00);
    return _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0x88), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
};

}  // namespace

void pad_copy_f32__avx2(const PadCopyArgs& a) {
  pad_copy_f32<Vec8>(a);
}

}  // namespace structadmm::kernels
