// The order of a task, shared by all instruction sets; included inside their anonymous namespaces.

// Where the tables of one pair apply.
struct Place {
  const PanelPair* pair;
  const void* x;
  void* y;
  const Bf16* residual;
  int32_t images;  // of the period that are there
};

inline Place place(const GemmBf16Args& a, int64_t i) {
  const int64_t n = i / a.pairs_per_period;
  const auto size = [](bool f32) -> int64_t { return f32 ? sizeof(float) : sizeof(Bf16); };
  return {a.pairs + i % a.pairs_per_period, static_cast<const std::byte*>(a.x) + n * a.x_period_stride * size(a.x_f32),
          static_cast<std::byte*>(a.y) + n * a.y_period_stride * size(a.y_f32),
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

// What a task does in its order: strips of pairs, each by one block after the other, for what a strip reads of x stays
// in the cache.
class Walk {
 public:
  explicit Walk(const GemmBf16Args& a) : a_(a), first_(a.first_pair) {
    if (!done()) next();
  }

  bool done() const { return first_ >= a_.last_pair; }
  const GemmBf16Block& block() const { return a_.blocks[block_]; }
  Units units() const { return part(a_, block()); }
  int64_t first_pair() const { return first_; }
  int pairs() const {
    return static_cast<int>((first_ + a_.strip < a_.last_pair ? first_ + a_.strip : a_.last_pair) - first_);
  }

  void next() {
    do {
      if (++block_ == a_.n_blocks) {
        first_ += pairs();
        block_ = 0;
      }
    } while (!done() && units().first >= units().last);
  }

 private:
  const GemmBf16Args& a_;
  int64_t first_, block_ = -1;
};
