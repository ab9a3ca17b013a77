// The kernel over a way `Dot` to multiply pairs, included by the ISA files inside their anonymous namespaces:
//   Weights weights(const Bf16*)          one pair of taps of a panel
//   Pixels pixels(uint32_t)               two pixels, the first in the low half
//   Vec add(Vec, const Weights&, const Pixels&)

[[gnu::noinline]] Vec curve(Vec v, const Epilogue& epilogue) {
  return activate(v, epilogue);
}

template <int V, int P, bool Listed>
void run_linear(const LinearBf16Args& a) {
  constexpr int kW = Vec::kWidth;
  Vec sums[P][V];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[p][v] = Vec::load(a.bias + v * kW);
  }
  const Bf16* w = a.w;
  const auto add = [&](auto pixel_pair) {
    typename Dot::Weights weights[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) weights[v] = Dot::weights(w + v * a.w_stride);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const auto pixels = Dot::pixels(pixel_pair(a.x + p * a.x_stride));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[p][v] = Dot::add(sums[p][v], weights[v], pixels);
    }
    w += 2 * kW;
  };
  int64_t t = 0;
  for (; t + 2 <= a.n_taps; t += 2) {
    if constexpr (Listed) {
      const int32_t first = a.taps[t], second = a.taps[t + 1];
      add([=](const Bf16* x) { return x[first].bits | static_cast<uint32_t>(x[second].bits) << 16; });
    } else {
      add([=](const Bf16* x) {
        uint32_t pair;
        __builtin_memcpy(&pair, x + t, 4);
        return pair;
      });
    }
  }
  if (t < a.n_taps) {
    const int64_t last = Listed ? a.taps[t] : t;
    add([=](const Bf16* x) { return static_cast<uint32_t>(x[last].bits); });
  }
  const Vec low = Vec::set1(a.epilogue.low), high = Vec::set1(a.epilogue.high);
  const bool curved = a.epilogue.activation != Activation::kClamp;
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const int64_t left = a.filters - v * kW;
    const int n = static_cast<int>(left < kW ? left : kW);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      Vec sum = sums[p][v];
      if (a.residual) sum = sum + Vec::load_n(a.residual + p * a.residual_stride + v * kW, n);
      sum = curved ? curve(sum, a.epilogue) : clamp(sum, low, high);
      sum.store_n(a.y + p * a.y_stride + v * kW, n);
    }
  }
}

template <int V, int P>
void linear(const LinearBf16Args& a) {
  if (a.taps) {
    run_linear<V, P, true>(a);
  } else {
    run_linear<V, P, false>(a);
  }
}

template <int V>
constexpr void fill(LinearBf16& k) {
  k.kernel[V - 1][0] = &linear<V, 1>;
  k.kernel[V - 1][1] = &linear<V, 2>;
  k.kernel[V - 1][2] = &linear<V, 4>;
  if constexpr (Dot::kTiles > 3) k.kernel[V - 1][3] = &linear<V, 8>;
}

constexpr LinearBf16 make(const char* isa, LinearBf16Kernel block = nullptr) {
  LinearBf16 k{.isa = isa, .lanes = Vec::kWidth, .tiles = Dot::kTiles, .kernel = {}, .block = block};
  fill<1>(k);
  fill<2>(k);
  fill<3>(k);
  return k;
}
