// What the gemm_compact kernels cost by their measured cycles: by it ops/tap_plan.cpp chooses between them. Pure
// functions.
#pragma once

#include <cstdint>

#include "kernels/gemm_compact/gemm_compact.h"
#include "ops/pixel_tiles.h"
#include "ops/tap_table.h"

namespace structadmm {

inline constexpr int64_t kSharedTaps = 1536;  // in one for several blocks, of which each panel has few

// Cycles of a job of `taps` taps by the filters kernel, for some panels and pixels.
double filters_cost(const kernels::GemmCompact& k, int width_class, int panels, int64_t pixels, double taps);

// Of one panel on the planes; slower: by where x lies. With the last vector in filters kernels, which costs infinity
// where that can't be: by itself, or together with those of other panels.
enum class Rest { kVector, kAlone, kTogether };
double planes_cost(const kernels::GemmCompact& k, int width, const CutSize& size, double taps, double slower,
                   Rest rest);

// By the panel kernel, for some filters that share their taps; and whether that is cheaper with the last vector in
// filters kernels.
double panel_cost(const kernels::GemmCompact& k, int64_t filters, const CutSize& size, double taps);
bool rest_pays(const kernels::GemmCompact& k, int64_t filters, const CutSize& size, double taps);

// Of all panels by the panel kernel, from one copy of the `taps` taps that some block has; and the same.
double shared_cost(const kernels::GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps);
bool shared_rest_pays(const kernels::GemmCompact& k, const Packed& packed, const CutSize& size, int64_t taps);

}  // namespace structadmm
