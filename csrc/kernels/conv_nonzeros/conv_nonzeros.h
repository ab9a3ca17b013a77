// Kernels of the convolution with single weights (non-structured sparsity, f32).
//
//   sum[f, p] = bias[f] + sum over nonzeros i of filter f: weight[i] * patch[offset[i] + p]
//
// A *lane* is a rectangle of outputs of one image; vector element l belongs to lane l, and neighbours in memory are the
// same pixel of `lanes` rectangles. So a tap moves a vector's address by whole vectors: every load is aligned, whatever
// the tap, the stride or the width of the map, and no lane holds a halo.
//
//   pack     rows of all lanes from planes into a *patch*: [channel][row][column][lane]
//   gather   the same from planes in lanes (ops/planes.h): copies of vectors, lanes moved where rectangles end
//   sum      one tile of rows x columns vectors in registers, over the nonzeros of a chunk of channels, all filters
//   unpack   sums of tiles back to planes, through the epilogue
//   finish   the same to planes in lanes; where the epilogue is no curve, and the residual in lanes too, sum does it
//
// Every output is one chain of multiply-adds over its filter's nonzeros in order, begun with the bias. Patches and sums
// are aligned to vectors; planes need no alignment, and nothing is read or written of them but what the arguments name.
// residual and y may be the same memory in the same order.
#pragma once

#include <cstdint>

#include "base/epilogue.h"
#include "base/isa.h"

namespace structadmm::kernels {

inline constexpr int kMostLanes = 16;
inline constexpr int kMostTileRows = 4, kMostTileCols = 8;

// Filters side by side in a sum kernel for small tiles: an accumulator's next multiply-add waits four cycles.
constexpr int filters_at_once(int vectors) {
  return vectors <= 2 ? 4 : vectors <= 6 ? 2 : 1;
}

struct Nonzero {
  int32_t offset;  // in the patch, floats
  float weight;
};

// Filters come in an order in which those that are summed together have about as many nonzeros: the i-th is i +
// shift[i].
struct NonzerosSumArgs {
  const float* patch;  // at the tile's first pixel
  int64_t row_stride;
  const Nonzero* nonzeros;
  const int32_t* begin;  // [filters + 1] into nonzeros, of the i-th
  const int32_t* shift;  // [filters]
  int64_t filters;
  const float* bias;  // [filters], or null: `sums` go on
  float* sums;        // [filters][rows][cols][lanes]
  // If given, the sums are whole and do not go to `sums`, but with what residual has there, clamped, to planes in
  // lanes.
  float* y = nullptr;
  const float* residual = nullptr;
  int64_t filter_stride = 0, y_row_stride = 0;
  int64_t residual_filter_stride = 0, residual_row_stride = 0;
  float low = 0, high = 0;
};

struct NonzerosPackArgs {
  const float* x;
  const int64_t* lane;      // [lanes] of the first element of channel 0, from x
  const int32_t* channels;  // [channel_count]
  int64_t channel_count, channel_stride, row_stride;
  int64_t rows, cols;
  const int32_t *row_place, *col_place;  // [rows], [cols]: where each goes in the patch, negative for nowhere
  float* patch;
  int64_t patch_channel_stride, patch_row_stride;
};

// A vector of the patch: of a channel, floats.
struct NonzerosPlace {
  int32_t from, to;
  int32_t shift;  // row of `shifts`
};

struct NonzerosGatherArgs {
  const float* x;
  const int32_t* channels;  // [channel_count]
  int64_t channel_count, channel_stride;
  const NonzerosPlace* places;
  int64_t as_they_are, place_count;  // the first places are copied as they are
  const int32_t* shifts;             // [][kMostLanes]: the lane that each is taken from, negative for zero
  float* patch;
  int64_t patch_channel_stride;
};

struct NonzerosUnpackArgs {
  // A row of tiles side by side, each [filters][rows][its columns][lanes]: tile_cols columns, the last perhaps fewer.
  const float* sums;
  int64_t filters, rows, cols, tile_cols;  // cols: of all tiles
  float* y;
  const int64_t* lane;  // [lanes] of the first tile's first pixel of the first filter, from y; not of finish
  int64_t filter_stride, row_stride;
  const float* residual;         // null for none
  const int64_t* residual_lane;  // null: in lanes
  int64_t residual_filter_stride, residual_row_stride;
  // [lanes]: a lane's outputs before this row or column are another lane's; `whole`: there are none.
  const int32_t *first_row, *first_col;
  bool whole;
  const Epilogue* epilogue;
};

using NonzerosSum = void (*)(const NonzerosSumArgs&);

struct ConvNonzeros {
  const char* isa;
  int lanes;
  // Vectors of a patch that stay in level 1 while sums and nonzeros go by, for all filters: of a tile of one or two
  // vectors, which waits for each place that is not there, and of larger ones, whose loads hide it.
  int patch_small, patch;
  NonzerosSum sum[kMostTileRows][kMostTileCols];  // [rows - 1][cols - 1], null where registers do not hold the tile
  void (*pack)(NonzerosPackArgs);
  void (*gather)(NonzerosGatherArgs);
  void (*unpack)(NonzerosUnpackArgs), (*finish)(NonzerosUnpackArgs);
};

// A pure function of the instruction set, which need not be this CPU's.
const ConvNonzeros& conv_nonzeros(Isa isa);

}  // namespace structadmm::kernels
