// The order of a task, shared by all instruction sets; included inside their anonymous namespaces.

// Where the tables of one pair apply.
struct Place {
  const PanelPair* pair;
  const Bf16* x;
  Bf16* y;
  const Bf16* residual;
  int32_t images;  // of the period that are there
};

inline Place place(const GemmBf16Args& a, int64_t i) {
  const int64_t n = i / a.pairs_per_period;
  return {a.pairs + i % a.pairs_per_period, a.x + n * a.x_period_stride, a.y + n * a.y_period_stride,
          a.residual ? a.residual + n * a.residual_period_stride : nullptr,
          a.images - static_cast<int32_t>(n) * a.period};
}

// Units of a block, in parts of a task.
struct Units {
  int first, last;
};

inline Units part(const GemmBf16Args& a, const GemmBf16Block& b) {
  const int all = (b.filters + 2 * kTile - 1) / (2 * kTile);
  const int first = a.first_unit - b.first_unit, last = a.last_unit - b.first_unit;
  return {first > 0 ? first : 0, last < all ? last : all};
}

// body(block, units, first pair, last pair), blocks inside of strips: what a strip reads of x stays in the cache.
template <class Body>
inline void walk(const GemmBf16Args& a, const Body& body) {
  for (int64_t first = a.first_pair; first < a.last_pair; first += a.strip) {
    const int64_t last = first + a.strip < a.last_pair ? first + a.strip : a.last_pair;
    for (int64_t b = 0; b < a.n_blocks; ++b) {
      const Units u = part(a, a.blocks[b]);
      if (u.first < u.last) body(a.blocks[b], u, first, last);
    }
  }
}
