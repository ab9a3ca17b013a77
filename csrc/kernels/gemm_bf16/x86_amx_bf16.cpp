// AMX: a tile product takes 16 filters x 32 taps by 32 taps x 16 pixels. Two tiles of filters by two of pixels
// accumulate, so that four loads feed four products: a load costs half a product.
#include <immintrin.h>

// GCC 12 takes the undefined operands inside its own unmasked intrinsics for variables of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/gemm_bf16/gemm_bf16.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/gemm_bf16/panel_bf16.h"

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// GCC's intrinsics for tiles do not say that they touch memory; the clobber keeps panels and sums in order with them.
inline void configure() {
  TileConfig c{};
  c.palette = 1;
  for (int i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    c.rows[i] = kTile;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
}

inline void fence() {
  __asm__ volatile("" : : : "memory");
}

// Where the sums go that the tiles still hold; null: there are none. How many tiles of filters and of pixels they are.
struct TileSums {
  float* c = nullptr;
  int filters = 0, pixels = 0;
};

// GCC's intrinsics want the number of a tile as a literal.
#define SADMM_BEGIN(tile)                                                          \
  inline void begin_##tile(const TileSums& before) {                               \
    if (tile / 2 < before.filters && tile % 2 < before.pixels) {                   \
      float* const c = before.c + tile / 2 * 2 * kTile * kTile + tile % 2 * kTile; \
      _tile_stored(tile, c, 2 * kTile * sizeof(float));                            \
    }                                                                              \
    _tile_zero(tile);                                                              \
  }
SADMM_BEGIN(0)
SADMM_BEGIN(1)
SADMM_BEGIN(2)
SADMM_BEGIN(3)
#undef SADMM_BEGIN

// Tiles 0 to 3 become sums of F tiles of filters by V of pixels: 2 f + v; 4 and 5 hold weights, 6 and 7 pixels. What is
// in a tile is stored just before its next sums begin, so that products hide the stores. meanwhile(steps of the panel
// that are read) is other work, a little behind each product.
template <int F, int V, class Meanwhile>
inline void multiply(const Bf16* w, const Bf16* panel, int steps, const TileSums& before, const Meanwhile& meanwhile) {
  fence();
  _tile_loadd(4, w, 64);
  _tile_loadd(6, panel, V * 64);
  begin_0(before);
  for (int s = 0;;) {
    _tile_dpbf16ps(0, 4, 6);
    fence();
    meanwhile(V == 1 ? s + 1 : s);
    fence();
    if (s == 0) begin_1(before);
    if constexpr (V == 2) {
      _tile_loadd(7, panel + kPanelRow, V * 64);
      _tile_dpbf16ps(1, 4, 7);
      fence();
      meanwhile(s + 1);
      fence();
    }
    if (s == 0) begin_2(before);
    if constexpr (F == 2) {
      _tile_loadd(5, w + kPanelTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      fence();
      meanwhile(s + 1);
      fence();
    }
    if (s == 0) begin_3(before);
    if constexpr (F == 2 && V == 2) {
      _tile_dpbf16ps(3, 5, 7);
      fence();
      meanwhile(s + 1);
      fence();
    }
    if (++s == steps) break;
    w += F * kPanelTile;
    panel += V * kPanelTile;
    _tile_loadd(4, w, 64);
    _tile_loadd(6, panel, V * 64);
  }
}

inline void begin_all(const TileSums& before) {
  begin_0(before);
  begin_1(before);
  begin_2(before);
  begin_3(before);
  fence();
}

// A unit whose sums are on their way from tiles to memory to y, some filters at a time.
struct Unit {
  Sums sums{};
  StoreSums store = nullptr;
  int done = 0;

  void work(const GemmBf16Args& a, int filters) {
    const int last = done + filters < sums.filters ? done + filters : sums.filters;
    if (done < last) store(a, sums, done, last);
    done = last;
  }
};

// The pairs of a strip and their panels, which are gathered in pieces.
class Strip {
 public:
  // What the walk is at; nothing, where it is done.
  void begin(const GemmBf16Args& a, const Walk& walk, Bf16* panels) {
    gathered_ = 0;
    pairs_ = walk.done() ? 0 : walk.pairs();
    if (pairs_ == 0) return;
    block_ = &walk.block();
    units_ = walk.units();
    panels_ = panels;
    for (int i = 0; i < pairs_; ++i) place_[i] = place(a, walk.first_pair() + i);
    rows_ = PanelRows(a, *block_, place_[0], panels_);
  }

  const GemmBf16Block& block() const { return *block_; }
  Units units() const { return units_; }
  int pairs() const { return pairs_; }
  bool empty() const { return pairs_ == 0; }
  const Place& at(int i) const { return place_[i]; }
  Bf16* panel(int i) const { return panels_ + int64_t{i} * block_->steps * 2 * kPanelTile; }
  int rows_done() const { return gathered_ < pairs_ ? rows_.done() : 0; }  // of the pair in work

  int rows_left() const {
    return gathered_ < pairs_ ? rows_.left() + (pairs_ - 1 - gathered_) * block_->steps * kTile : 0;
  }

  void gather(const GemmBf16Args& a, int rows) {
    while (rows > 0 && gathered_ < pairs_) {
      const int now = rows < rows_.left() ? rows : rows_.left();
      rows_.gather(now);
      rows -= now;
      if (rows_.left() > 0) return;
      if (++gathered_ < pairs_) rows_ = PanelRows(a, *block_, place_[gathered_], panel(gathered_));
    }
  }

 private:
  const GemmBf16Block* block_;
  Units units_;
  int pairs_, gathered_;
  Bf16* panels_;
  PanelRows rows_;
  Place place_[kMostStrip];
};

// Products leave one of the two vector ports free: between them the sums of the unit before the last are stored and the
// panels of the next strip are gathered, in pieces, for a long one would fill the queue of instructions in flight and
// keep the next product out. All pairs of a strip follow each other for a unit of filters, so that what is written to
// one channel is a run. Where a strip is one pair, all it needs should stay in the first cache, so a long panel has no
// second buffer: the next one's rows take the place of those that the last unit has read.
void run(const GemmBf16Args& a) {
  Walk walk(a);
  if (walk.done()) return;
  configure();
  constexpr int kShort = 2, kPieces = 2, kSums = 4 * kTile * kTile;
  const Act act = act_of(a.epilogue);
  auto* const sums = reinterpret_cast<float*>(a.scratch);  // two of 32 filters x 32 pixels
  auto* const panels = reinterpret_cast<Bf16*>(a.scratch + 2 * kSums * sizeof(float));
  int most_steps = 0;
  for (int64_t b = 0; b < a.n_blocks; ++b) most_steps = a.blocks[b].steps > most_steps ? a.blocks[b].steps : most_steps;
  Bf16* const second = panels + int64_t{a.strip} * most_steps * 2 * kPanelTile;
  Unit in_tiles, in_memory;
  TileSums before;
  int turn = 0;
  Strip strips[2];
  strips[0].begin(a, walk, panels);
  strips[0].gather(a, strips[0].rows_left());
  for (int current = 0; !walk.done(); current ^= 1) {
    Strip &strip = strips[current], &next = strips[current ^ 1];
    walk.next();
    const GemmBf16Block& b = strip.block();
    const bool long_panels = b.steps > kShort || (!walk.done() && walk.block().steps > kShort);
    const bool in_place = a.strip == 1 && long_panels;
    next.begin(a, walk, in_place == (strip.panel(0) == panels) ? panels : second);
    int pieces = kPieces * (strip.units().last - strip.units().first) * strip.pairs();
    for (int unit = strip.units().first; unit < strip.units().last; ++unit) {
      const int filters = b.filters - unit * 2 * kTile < 2 * kTile ? b.filters - unit * 2 * kTile : 2 * kTile;
      const int filter_tiles = filters > kTile ? 2 : 1;
      const Bf16* w = static_cast<const Bf16*>(b.w) + static_cast<int64_t>(unit) * b.steps * 2 * kPanelTile;
      for (int i = 0; i < strip.pairs(); ++i, pieces -= kPieces, turn ^= 1) {
        const Place& at = strip.at(i);
        const int vectors = at.pair->vectors;
        const auto tiles = [&]<int F, int V>() {
          const int turns = in_place ? kPieces : pieces;
          const int rows = in_place && unit + 1 < strip.units().last ? 0 : (next.rows_left() + turns - 1) / turns;
          const int rows_of_step = in_place && !next.empty() ? kTile * V / next.at(0).pair->vectors : 0;
          const int every = (b.steps * F * V + kPieces - 1) / kPieces;
          int since = 0;
          multiply<F, V>(w, strip.panel(i), b.steps, before, [&](int steps_read) {
            if (++since < every) return;
            since = 0;
            in_memory.work(a, 2 * kTile / kPieces);
            const int free = in_place ? steps_read * rows_of_step - next.rows_done() : rows;
            next.gather(a, free < rows ? free : rows);
          });
        };
        if (b.steps == 0) {
          begin_all(before);
        } else if (filter_tiles == 2) {
          vectors == 2 ? tiles.template operator()<2, 2>() : tiles.template operator()<2, 1>();
        } else {
          vectors == 2 ? tiles.template operator()<1, 2>() : tiles.template operator()<1, 1>();
        }
        in_memory.work(a, 2 * kTile);
        in_memory = in_tiles;
        before = {sums + turn * kSums, filter_tiles, vectors};
        in_tiles.sums = {before.c, b.bias + unit * 2 * kTile, b.first_filter + unit * 2 * kTile, filters, at};
        in_tiles.store = store_of(a, act, in_tiles.sums);
        in_tiles.done = 0;
      }
    }
    next.gather(a, next.rows_left());
  }
  begin_all(before);
  in_memory.work(a, 2 * kTile);
  in_tiles.work(a, 2 * kTile);
  _tile_release();
}

}  // namespace

extern constinit const GemmBf16 gemm_bf16_amx_bf16 = {"gemm_bf16_32x32__amx_bf16", WeightLayout::kTiles, run};

}  // namespace structadmm::kernels
