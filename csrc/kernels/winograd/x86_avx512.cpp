#include "kernels/winograd/isa_tables.h"
#include "kernels/winograd/winograd_points.h"
#include "simd/vec_avx512.h"

namespace structadmm::kernels {
namespace {

using namespace structadmm::avx512;
using avx512::Vec;

// pick: j, j + 4 to j + 28, and the same plus one. d0 lane i = p[4 * i + j], d1 lane i = p[4 * i + j + 1].
inline void halves(const float* p, __m512i pick, Vec& d0, Vec& d1) {
  const __m512 a = _mm512_permutex2var_ps(_mm512_loadu_ps(p), pick, _mm512_loadu_ps(p + 16));
  const __m512 b = _mm512_permutex2var_ps(_mm512_loadu_ps(p + 32), pick, _mm512_loadu_ps(p + 48));
  d0.v = _mm512_shuffle_f32x4(a, b, 0x44);
  d1.v = _mm512_shuffle_f32x4(a, b, 0xEE);
}

// d[j] lane i = p[4 * i + j].
inline void deinterleave(const float* p, Vec (&d)[6]) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i third = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  halves(p, first, d[0], d[1]);
  halves(p, third, d[2], d[3]);
  halves(p + 4, first, d[4], d[5]);
}

#include "kernels/winograd/generic.h"

}  // namespace

extern constinit const Winograd winograd_avx512 = {"avx512", Vec::kWidth, &transform_in<float>, &transform_out,
                                                   &transform_in<Bf16>};

}  // namespace structadmm::kernels
