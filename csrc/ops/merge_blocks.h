// Neighbouring blocks of filters made one block over the union of their taps.
//
// A tile product takes 16 filters at once and a panel is gathered for each block, so narrow blocks cost nearly what
// wide ones do: where blocks share taps, or are so narrow that tiles stand half empty, a product with some zero weights
// is faster. The sums stay the same, but an infinity or NaN in x reaches all filters of a merged block.
#pragma once

#include <cstdint>

#include "ops/conv.h"

namespace structadmm {

// What a block costs, in cycles for 32 pixels: steps of 32 taps, each with a panel and products of tiles of filters.
struct BlockCosts {
  int64_t panel = 0, product = 0, unit = 0;  // of a step; of a step and 16 filters; of 32 filters
};

// `spec` in the cheapest blocks of at most 64 filters, or as it is where blocks in place are cheapest or the merged
// weight would grow beyond what a second-level cache keeps for all pixels. Blocks of a conv group, and those without
// taps, stay among themselves.
ConvSpec merge_blocks(const ConvSpec& spec, const BlockCosts& costs);

}  // namespace structadmm
