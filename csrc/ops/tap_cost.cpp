#include "ops/tap_cost.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/div_up.h"

namespace structadmm {
namespace {

// The sum of tile(vectors in it) over tiles of at most `most` vectors, as even as ops/pixel_tiles.cpp makes them.
double over_tiles(int64_t vectors, int most, const auto& tile) {
  const int64_t tiles = div_up(vectors, int64_t{most}), least = vectors / tiles, more = vectors % tiles;
  return static_cast<double>(tiles - more) * tile(least) +
         (more == 0 ? 0.0 : static_cast<double>(more) * tile(least + 1));
}

// Cycles of a panel and tile besides its taps, and of a vector of sums that waits for the next part.
constexpr double kCall = 40, kSum = 1.5;

double stores_cost(const kernels::GemmCompact& k, int64_t filters, const CutSize& size) {
  return static_cast<double>(filters) *
         (k.store_cycles[0] * static_cast<double>(size.whole) + k.store_cycles[1] * static_cast<double>(size.pieces) +
          k.store_cycles[2] * static_cast<double>(size.runs));
}

}  // namespace

// What a tile costs besides its taps (its first sums, its stores) was measured in AVX-512.
double filters_cost(const kernels::GemmCompact& k, int width_class, int panels, int64_t pixels, double taps) {
  const int most = k.pixels[width_class][panels - 1];
  const int64_t tiles = div_up(pixels, most);
  const double each = static_cast<double>(pixels) / static_cast<double>(tiles * most);
  constexpr double kSpread = 280;  // of a vector of pixels and a panel
  const double tap = k.filters_cycles[width_class][panels - 1] * std::max(0.4, each);
  return static_cast<double>(tiles) * (tap * taps + 30) +
         kSpread * panels * static_cast<double>(div_up(pixels, k.lanes));
}

namespace {

// With the pixels of the last vector as a vector, or one by one, which costs infinity where it can't be.
struct PanelCost {
  double vectors, rest;
  double least() const { return std::min(vectors, rest); }
};

bool can_rest(const kernels::GemmCompact& k, const CutSize& size) {
  return k.rest_cycles[0] > 0 && size.vectors > 1 && size.rest > 0 &&
         size.rest <= std::min({k.pixels[0][0], k.pixels[1][0], k.pixels[2][0]});
}

// Of a panel and tap. alone: where each panel has taps of its own, or is narrow.
double cycles_of_rest(const kernels::GemmCompact& k, int pixels, bool alone) {
  const auto& cycles = !alone && rest_together(k, pixels) ? k.together_cycles : k.rest_cycles;
  return std::max(cycles[0], cycles[1] * pixels);
}

constexpr double kNever = std::numeric_limits<double>::infinity();

PanelCost panel_costs(const kernels::GemmCompact& k, int64_t filters, const CutSize& size, double taps) {
  const auto calls = static_cast<double>(div_up(filters, int64_t{kernels::kMaxPanel})),
             parts = std::max(1.0, std::ceil(taps / static_cast<double>(k.panel_taps)));
  const double collect = k.collect_cycles[static_cast<int>(size.reads)];
  const auto tile = [&](int64_t vectors) {
    return taps * (k.panel_cycles[vectors - 1] * static_cast<double>(div_up(filters, 4)) +
                   collect * static_cast<double>(vectors)) +
           k.copy_cycles + kCall * calls +
           (parts - 1) * (kCall * calls + kSum * static_cast<double>(filters * vectors));
  };
  const double stores = stores_cost(k, filters, size);
  PanelCost cost{over_tiles(size.vectors, size.most, tile) + stores, kNever};
  if (can_rest(k, size)) {
    cost.rest = over_tiles(size.vectors - 1, size.most, tile) + stores +
                taps * (cycles_of_rest(k, size.rest, false) * calls + collect) + parts * k.rest_call * calls +
                k.copy_cycles;
  }
  return cost;
}

PanelCost shared_costs(const kernels::GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps) {
  const auto parts = static_cast<double>(div_up(taps, kSharedTaps));
  const double collect = static_cast<double>(taps) * k.collect_cycles[static_cast<int>(size.reads)];
  const auto tile = [&](int64_t vectors) {
    double cycles = collect * static_cast<double>(vectors);
    for (const Panel& p : packed.panels) {
      cycles += k.slots * static_cast<double>(p.n_taps * (p.width / 4)) * k.panel_cycles[vectors - 1] +
                parts * (kCall + kSum * static_cast<double>(p.width * vectors));
    }
    return cycles;
  };
  const double stores = stores_cost(k, packed.header->out_channels, size);
  PanelCost cost{over_tiles(size.vectors, size.most, tile) + stores, kNever};
  if (can_rest(k, size)) {
    cost.rest = over_tiles(size.vectors - 1, size.most, tile) + stores + collect;
    for (const Panel& p : packed.panels) {
      cost.rest += cycles_of_rest(k, size.rest, true) * static_cast<double>(p.n_taps) + parts * k.rest_call;
    }
  }
  return cost;
}

}  // namespace

double planes_cost(const kernels::GemmCompact& k, int width, const CutSize& size, double taps, double slower,
                   Rest rest) {
  const auto tile = [&](int64_t count) {
    return k.planes_cycles[count - 1] * slower * taps * (width / 4) + k.planes_call;
  };
  const double stores = stores_cost(k, width, size);
  if (rest == Rest::kVector) return over_tiles(size.vectors, size.most, tile) + stores;
  if (!can_rest(k, size)) return kNever;
  const bool alone = rest == Rest::kAlone || width < kernels::kMaxPanel;
  return over_tiles(size.vectors - 1, size.most, tile) + stores + taps * cycles_of_rest(k, size.rest, alone) +
         k.rest_call;
}

double panel_cost(const kernels::GemmCompact& k, int64_t filters, const CutSize& size, double taps) {
  return panel_costs(k, filters, size, taps).least();
}

bool rest_pays(const kernels::GemmCompact& k, int64_t filters, const CutSize& size, double taps) {
  const PanelCost cost = panel_costs(k, filters, size, taps);
  return cost.rest < cost.vectors;
}

double shared_cost(const kernels::GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps) {
  return shared_costs(k, packed, size, taps).least();
}

bool shared_rest_pays(const kernels::GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps) {
  const PanelCost cost = shared_costs(k, packed, size, taps);
  return cost.rest < cost.vectors;
}

}  // namespace structadmm
