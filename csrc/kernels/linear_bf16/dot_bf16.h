// Included by x86_avx512_bf16.cpp and x86_amx_bf16.cpp inside their anonymous namespaces.

// A pair at a time by vdpbf16ps.
struct Dot {
  using Weights = __m512bh;
  using Pixels = __m512bh;
  static constexpr int kTiles = 4;

  static Weights weights(const Bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Pixels pixels(uint32_t pair) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))); }
  static Vec add(Vec sum, Weights w, Pixels x) { return {_mm512_dpbf16_ps(sum.v, w, x)}; }
};
