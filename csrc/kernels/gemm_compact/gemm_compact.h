// Micro-kernels of the compacted convolution and linear layer (f32).
//
//   y[f, p] = epilogue(bias[f] + sum over taps t of w[t, f] * x[t, p])
//
// A *panel* is 16, 8 or 4 consecutive filters that share one list of taps; its weights are stored [tap][panel width],
// zeros behind the last filter. A tap is a pair (channel, kernel position) and reads x at channel * channel_stride +
// position_offset[position], so a tap list does not depend on the size of the map. Every output is one chain of
// multiply-adds over the taps in order, begun with the bias: it depends neither on the tile nor on the thread.
//
//   filters  registers hold P pixels x NV panels (vectors of filters), pixels are broadcast: needs no stride and no
//            width of the map to fill its vectors, only enough filters that share their taps
//   panel    registers hold MR filters x NR vectors of pixels, weights are broadcast; for all filters of a panel and
//            some tiles, from one of three places (enum From): from a copy of x in the order of its loop, made by
//            *collect* for one tile and some taps; from a copy of the taps of several blocks, of which it has some; or
//            from the planes. A copy pays where enough filters share it; a stride costs it nothing
//
// Pointers need no alignment. panel (on the planes) and collect read whole vectors (as many as their window) at every
// PixelVector::offset, filters only the pixels it is given; residual is read, and y written, only where outputs are
// and, where masks are dear, in the halo between two rows (y: zeros). x and y do not overlap; residual and y may be the
// same memory in the same order. Kernels check nothing.
#pragma once

#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"
#include "kernels/gemm_compact/packed.h"

namespace structadmm::kernels {

inline constexpr int kMaxPanel = 16;   // filters
inline constexpr int kMaxLanes = 16;   // of any instruction set
inline constexpr int kMaxSpan = 64;    // pixels whose sums wait in L1 to be spread
inline constexpr int kMaxPixels = 8;   // P of any instruction set
inline constexpr int kMaxVectors = 6;  // NR of any instruction set
inline constexpr int kMaxPanels = 4;   // NV of any instruction set

// One store of a vector of pixels, for each filter: y[i] = lane from[i] of it, for the bits i of `lanes`.
struct PixelStore {
  int64_t y, residual;  // offsets of y[0] and of what is added to it
  uint32_t lanes;
  int32_t image;  // stores of images that are not there (image >= Output::images) are left out
  int8_t from[kMaxLanes];
  int8_t count;   // y[0] to y[count - 1] are outputs, or the halo between two rows, which may take zeros
  bool straight;  // whether from[i] = i for all of `lanes`
};

// A vector of pixels: lane i reads x at offset + i, or in a window of 2 or 4 vectors at offset + lane[i], 0 <= lane[i]
// < window * lanes.
struct PixelVector {
  int64_t offset;
  int32_t first_store, stores;
  int8_t lane[kMaxLanes];
  // Of the first store; straight: y[0] to y[straight - 1] take the first lanes, where it is the only one and straight,
  // otherwise 0.
  int64_t y = 0, residual = 0;
  uint32_t lanes = 0;
  int32_t image = 0, straight = 0;
  // Where all lanes are outputs of two rows, the places between which may take zeros: how many lanes are of the first,
  // and the places between, in y (at most a vector) and in the residual. Otherwise run = 0.
  int32_t run = 0, gap = 0, residual_gap = 0;
};

// How collect reads a vector. In a window of two vectors kTwoRuns: places in two runs (lane[i] = i up to some lane, i +
// a number of at most `lanes` from there on), and kAlternate: every other place (lane[i] = 2 i). In one of four
// kFourth: every fourth (lane[i] = 4 i).
enum class Reads { kWindow1, kWindow2, kWindow4, kTwoRuns, kAlternate, kFourth };
inline constexpr int kReads = 6;
constexpr int window_of(Reads r) {
  return r == Reads::kWindow1 ? 1 : r == Reads::kWindow4 || r == Reads::kFourth ? 4 : 2;
}

struct Output {
  float* y;
  int64_t y_stride;  // from filter to filter
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  const PixelStore* stores = nullptr;
  int images = 1;
  Epilogue epilogue = {};
};

// Planes without the halo that the kernel reaches: at its edges are zeros.
struct Edges {
  const float *first, *end;  // of x: nothing else is read
  const uint8_t* position;   // [n_taps] of each tap
  int positions;
  const uint16_t* inside;  // [NR][positions] lanes that are inside the plane at a position
};
inline constexpr int kMaxEdgePositions = 64;

// copy[t][v] = the vector v at tap t: whole vectors, one behind the other.
struct CollectArgs {
  const float* x;
  const int64_t* offset;  // [n_taps] in x
  int64_t n_taps;
  const PixelVector* vectors;  // [NR]
  float* copy;                 // aligned to a vector
  Edges edges = {};            // for collect_edges
};

// Where the panel kernel finds tap t: the t-th of the copy, the slot[t]-th of it, or in x from offset[t] on.
enum class From { kCopy, kSlots, kPlanes };
inline constexpr int kFrom = 3;

struct PanelTile {
  const float* x;               // the copy of collect, or in planes the first image
  const PixelVector* vectors;   // [NR]; of planes in a window of one vector
  float* sums = nullptr;        // of all panels, where they go on from one part of the taps to the next
  int64_t y = 0, residual = 0;  // offsets of the first image
  int images = 1;               // as Output::images
  int64_t ahead = 0;            // an offset in the planes: see PanelArgs::fetch_planes
};

struct PanelArgs {
  const PanelTile* tiles;
  int n_tiles = 1;
  const uint16_t* slot = nullptr;   // [n_taps]
  const int64_t* offset = nullptr;  // [n_taps]
  int64_t n_taps;
  const float* w;  // [n_taps][w_stride]
  int64_t w_stride;
  int filters;        // 1 to the width of the panel of weights
  const float* bias;  // null where the sums go on from those in memory
  int64_t sums = 0;   // offset in PanelTile::sums: [width of the panel][NR][lanes], of which a kernel may write all
  // What each tap reads of the planes at PanelTile::ahead, where that is not 0, is fetched into L2 meanwhile.
  bool fetch_planes = false;
  bool last = true;  // whether the sums are whole and go to y; otherwise to memory
  // If given, filters * n_taps floats from here on, but perhaps the last of them, are fetched during the last tile: the
  // weights of the next call, or where the tile fetches x a part of them. And as many during each of the others, up to
  // `ahead_end`: what the next step reads.
  const float *next = nullptr, *ahead = nullptr, *ahead_end = nullptr;
  Output out;  // its images are those of the tiles
};

struct FiltersArgs {
  const float* x;
  const int64_t* offset;  // [n_taps] in x
  int64_t n_taps;
  const float* w;  // of panel v from w + v * panel_stride on: [n_taps][panel width]
  int64_t panel_stride;
  // The sums of pixel p begin with start + p * start_stride: the bias (start_stride = 0), or the sums over earlier
  // taps.
  const float* start;
  int64_t start_stride = 0;
  // Fetched into L2 meanwhile, where they are given and the pixels are neighbours: what each tap reads of the pixel at
  // this offset in x, and a line per tap from here on.
  int64_t ahead = 0;
  const void* stream = nullptr;
  int filters;           // 1 to NV * width: those that exist
  const int32_t* pixel;  // [P] offsets in x
  // With `row`, filters are neighbours in y (y_stride = 1), and pixel p goes to y + row[p], plus residual +
  // residual_row[p]. Otherwise the sums of pixel p go to sums + p * sums_stride, a whole number of panels, and await
  // SpreadArgs.
  const int32_t* row;
  const int32_t* residual_row = nullptr;
  float* sums = nullptr;
  int64_t sums_stride = 0;
  Output out;
};

// The sums of a span of pixels, from filters kernels, to where the stores of its vectors say. A tile of pixels by
// itself would write a few elements of a line, of as many pages as it has filters; the processor translates stores for
// 16 pages at a time.
struct StoreRange {
  int64_t first;
  int count;
};
struct SpreadArgs {
  const float* sums;  // [vectors * lanes][sums_stride]
  int64_t sums_stride;
  int filters, vectors;      // 1 to kMaxSpan / lanes
  const StoreRange* stores;  // [vectors], in out.stores
  Output out;
};

using CollectKernel = void (*)(const CollectArgs&);
using PanelKernel = void (*)(const PanelArgs&);
using FiltersKernel = void (*)(const FiltersArgs&);
using SpreadKernel = void (*)(const SpreadArgs&);

// The kernels of one instruction set, null where there is none, by width class (0, 1, 2 for panels 16, 8, 4 wide).
struct GemmCompact {
  const char* isa;
  int lanes;                  // pixels in a vector
  int pixels[3][kMaxPanels];  // largest P: [width class][NV - 1]; beyond nv for together_cycles alone
  int nr;                     // largest NR
  int nv[3];                  // largest NV
  int nr_narrow = nr;         // largest NR on the planes where no panel has more than 4 filters
  // Measured cycles per tap of a full tile, by which the kernel for a shape is chosen: of filters [width class][NV -
  // 1], and for 4 filters on the planes [NR - 1].
  double filters_cycles[3][kMaxPanels];
  double planes_cycles[kMaxVectors];
  double planes_call = 0;                                   // of a panel and tile on the planes, besides its taps
  double pointwise = 1;                                     // what 1x1 multiplies planes_cycles by: each tap is a page
  double far = 1;                                           // what others do where an image of x exceeds 1 MiB
  double many = 1;                                          // and where a panel of more than 4 filters has many taps
  FiltersKernel filters_kernel[3][kMaxPanels][kMaxPixels];  // [width class][NV - 1][P - 1]
  int panel_rows[kMaxVectors];                              // filters at a time: [NR - 1]
  // As planes_cycles, from a copy; 0: there is no collect, and no panel kernel but on the planes.
  double panel_cycles[kMaxVectors] = {};
  int panel_taps = 0;                  // in a copy
  double collect_cycles[kReads] = {};  // of a tap and vector
  double mask_cycles[kReads] = {};     // more than that where x has edges
  double store_cycles[3] = {};         // of the panel kernel: of a whole vector, of a piece, of PixelVector::run
  double copy_cycles = 0;              // of a tile that is copied for one block, besides its taps
  // Of a tap and panel by a filters kernel, for pixels that fill no vector: at least (a chain of multiply-adds waits
  // for itself), and of each pixel. 0: not measured, and such pixels are a vector.
  double rest_cycles[2] = {};
  // Likewise where kMaxPanels panels 16 wide that follow one another go together, as many chains: if not 0, for as many
  // pixels as `pixels` says.
  double together_cycles[2] = {};
  double rest_call = 60;                                  // of a panel and part, with the way of its sums to y
  double slots = 1;                                       // what From::kSlots multiplies panel_cycles by
  CollectKernel collect[kReads][kMaxVectors] = {};        // [Reads][NR - 1]
  CollectKernel collect_edges[kReads][kMaxVectors] = {};  // the same of planes with Edges
  PanelKernel panel_kernel[kFrom][kMaxVectors] = {};      // [From][NR - 1]
  // For a y that is more than caches keep until it is read: lines that are written as a whole go past them and are not
  // fetched before. The caller fences. Null where there is none.
  PanelKernel panel_past_caches[kFrom][kMaxVectors] = {};
  SpreadKernel spread;
  SpreadKernel spread_bf16 = nullptr;  // where y and the residual are bf16; null where there is none
};

constexpr bool has_copies(const GemmCompact& k) {
  return k.panel_cycles[0] > 0;
}

// Whether kMaxPanels panels go together for so many pixels that fill no vector.
constexpr bool rest_together(const GemmCompact& k, int pixels) {
  return k.together_cycles[0] > 0 && pixels <= k.pixels[0][kMaxPanels - 1];
}

// 0, 1, 2 for panels 16, 8, 4 wide.
constexpr int width_class(int width) {
  return width == 16 ? 0 : width == 8 ? 1 : 2;
}

// The filters kernel of `panels` panels over `rows` pixels that may be more than it takes, in pieces of about the same
// size.
inline void run_rows(const GemmCompact& k, int panels, FiltersArgs a, int width, int rows) {
  const int most = k.pixels[width_class(width)][panels - 1], pieces = (rows + most - 1) / most;
  for (int i = 0, begin = 0; i < pieces; ++i) {
    const int end = (i + 1) * rows / pieces;
    k.filters_kernel[width_class(width)][panels - 1][end - begin - 1](a);
    a.pixel += end - begin;
    a.row += end - begin;
    if (a.residual_row) a.residual_row += end - begin;
    begin = end;
  }
}

// The kernels are those of the instruction set, which need not be this CPU's; their cycles may be this CPU's.
const GemmCompact& gemm_compact(Isa isa);

}  // namespace structadmm::kernels
