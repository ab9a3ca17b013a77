#include "kernels/winograd/isa_tables.h"
#include "kernels/winograd/winograd_points.h"
#include "simd/vec_avx2.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::avx2;
using avx2::Vec;

// Four floats of tile i and of tile i + 4.
inline __m256 two_tiles(const float* p, int i) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * i)), _mm_loadu_ps(p + 4 * i + 16), 1);
}

// d[j] lane i = p[4 * i + j].
inline void deinterleave(const float* p, Vec (&d)[6]) {
  const __m256 r0 = two_tiles(p, 0), r1 = two_tiles(p, 1), r2 = two_tiles(p, 2), r3 = two_tiles(p, 3);
  const __m256 low0 = _mm256_unpacklo_ps(r0, r1), low1 = _mm256_unpacklo_ps(r2, r3);
  const __m256 high0 = _mm256_unpackhi_ps(r0, r1), high1 = _mm256_unpackhi_ps(r2, r3);
  const __m256 r4 = two_tiles(p, 4);
  const __m256 low2 = _mm256_unpacklo_ps(r1, r2), low3 = _mm256_unpacklo_ps(r3, r4);
  d[0].v = _mm256_shuffle_ps(low0, low1, 0x44);
  d[1].v = _mm256_shuffle_ps(low0, low1, 0xEE);
  d[2].v = _mm256_shuffle_ps(high0, high1, 0x44);
  d[3].v = _mm256_shuffle_ps(high0, high1, 0xEE);
  d[4].v = _mm256_shuffle_ps(low2, low3, 0x44);
  d[5].v = _mm256_shuffle_ps(low2, low3, 0xEE);
}

#include "kernels/winograd/generic.h"

}  // namespace

extern constinit const Winograd winograd_avx2 = {"avx2", Vec::kWidth, &transform_in<float>, &transform_out};

}  // namespace structadmm::kernels
