#include "ops/merge_blocks.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "base/div_up.h"

namespace structadmm {
namespace {

constexpr int64_t kStep = 32, kTile = 16, kUnit = 32;
constexpr int64_t kMostFilters = 64, kMostBytes = 256 << 10;

int64_t cost(const BlockCosts& c, int64_t taps, int64_t filters) {
  return div_up(taps, kStep) * (c.panel + c.product * div_up(filters, kTile)) + c.unit * div_up(filters, kUnit);
}

struct Merged {
  size_t first, last;  // blocks
  std::vector<int32_t> taps;
};

// The cheapest cut of all blocks into runs, by the cheapest of those that end before each.
std::vector<Merged> cheapest(const ConvSpec& s, const BlockCosts& costs) {
  const size_t n = s.block_filters.size();
  const int64_t per_group = s.out_channels / s.groups;
  std::vector<int64_t> first_filter(n + 1, 0), best(n + 1, std::numeric_limits<int64_t>::max());
  for (size_t b = 0; b < n; ++b) first_filter[b + 1] = first_filter[b] + s.block_filters[b];
  std::vector<Merged> ending(n + 1);
  best[0] = 0;
  for (size_t last = 1; last <= n; ++last) {
    std::vector<int32_t> taps;
    for (size_t first = last; first-- > 0;) {
      const auto begin = s.taps.begin() + s.block_taps[first], end = s.taps.begin() + s.block_taps[first + 1];
      const int64_t filters = first_filter[last] - first_filter[first];
      const bool alone = first + 1 == last;
      const bool fits = filters <= kMostFilters && begin != end && !taps.empty() &&
                        first_filter[first] / per_group == (first_filter[last] - 1) / per_group;
      if (!alone && !fits) break;
      std::vector<int32_t> both;
      std::set_union(taps.begin(), taps.end(), begin, end, std::back_inserter(both));
      taps = std::move(both);
      const int64_t total = best[first] + cost(costs, static_cast<int64_t>(taps.size()), filters);
      if (total >= best[last]) continue;
      best[last] = total;
      ending[last] = {first, last, taps};
    }
  }
  std::vector<Merged> found;
  for (size_t last = n; last > 0; last = found.back().first) found.push_back(std::move(ending[last]));
  std::reverse(found.begin(), found.end());
  return found;
}

}  // namespace

ConvSpec merge_blocks(const ConvSpec& s, const BlockCosts& costs) {
  const std::vector<Merged> all = cheapest(s, costs);
  int64_t weights = 0;
  for (const Merged& m : all) {
    for (size_t b = m.first; b < m.last; ++b) weights += s.block_filters[b] * static_cast<int64_t>(m.taps.size());
  }
  constexpr int64_t kBf16 = 2;
  if (all.size() == s.block_filters.size() || weights * kBf16 > kMostBytes) return s;
  ConvSpec merged = s;
  merged.weight.clear();
  merged.taps.clear();
  merged.block_filters.clear();
  merged.block_taps = {0};
  const float* from = s.weight.data();
  for (const Merged& m : all) {
    int32_t filters = 0;
    for (size_t b = m.first; b < m.last; ++b) {
      const int32_t* const taps = s.taps.data() + s.block_taps[b];
      const int32_t count = s.block_taps[b + 1] - s.block_taps[b];
      for (int32_t f = 0; f < s.block_filters[b]; ++f, from += count) {
        int32_t k = 0;
        for (const int32_t tap : m.taps) {
          const bool mine = k < count && taps[k] == tap;
          merged.weight.push_back(mine ? from[k] : 0.0f);
          k += mine ? 1 : 0;
        }
      }
      filters += s.block_filters[b];
    }
    merged.taps.insert(merged.taps.end(), m.taps.begin(), m.taps.end());
    merged.block_filters.push_back(filters);
    merged.block_taps.push_back(static_cast<int32_t>(merged.taps.size()));
  }
  return merged;
}

}  // namespace structadmm
