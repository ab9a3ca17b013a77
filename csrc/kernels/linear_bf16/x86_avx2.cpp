#include "kernels/linear_bf16/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

using avx2::Vec;

// bf16 are the upper halves of f32: a pair is widened by a shift and a mask.
struct Dot {
  struct Pair {
    Vec first, second;
  };
  using Weights = Pair;
  using Pixels = Pair;
  static constexpr int kTiles = 3;

  static Pair widened(__m256i pair) {
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(-65536)))}};
  }
  static Weights weights(const Bf16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Pixels pixels(uint32_t pair) { return widened(_mm256_set1_epi32(static_cast<int>(pair))); }
  static Vec add(Vec sum, const Weights& w, const Pixels& x) {
    return fma(w.second, x.second, fma(w.first, x.first, sum));
  }
};

#include "kernels/linear_bf16/generic.h"

}  // namespace

extern constinit const LinearBf16 linear_bf16_avx2 = make("avx2");

}  // namespace structadmm::kernels
