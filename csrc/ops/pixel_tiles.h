// How the outputs of a convolution are cut for the gemm_compact kernels: into vectors of pixels and tiles of vectors,
// or into single pixels. Pure functions of planes and geometry.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/gemm_compact/gemm_compact.h"
#include "ops/planes.h"

namespace structadmm {

struct ConvGeometry {
  int64_t stride[2], padding[2], dilation[2];
  bool operator==(const ConvGeometry&) const = default;
};

using KernelSize = std::array<int64_t, 2>;

struct ConvPlanes {
  Planes x, y, residual;  // residual: as y without one
  ConvGeometry geometry;
  int64_t outputs() const { return y.height * y.width; }
};

// Throws Error, worded for `op`, where the planes do not fit the weight, the geometry or each other.
void check_planes(const char* op, const ConvPlanes& planes, int64_t in_channels, int64_t out_channels,
                  const KernelSize& kernel, Dtype dtype = Dtype::kF32);

// The outputs of `period` images as vectors of pixels, and those in tiles.
struct PixelTiles {
  struct Tile {
    int64_t first;
    int count;
    kernels::Reads reads;
    int rest = 0;  // pixels of a vector that is a tile by itself, where they are few
  };
  int window = 1;  // vectors of x that hold the pixels of one: 1, 2 or 4
  int64_t period = 1;
  std::vector<kernels::PixelVector> vectors;
  std::vector<kernels::PixelStore> stores;
  std::vector<Tile> tiles;
  // Tiles of whole vectors.
  int64_t whole() const { return static_cast<int64_t>(tiles.size()) - (!tiles.empty() && tiles.back().rest > 0); }
  // Of planes without the halo that the kernel reaches: [vectors][positions] lanes that are inside x.
  std::vector<uint16_t> inside;
};

// The outputs of `period` images one by one.
struct FilterTiles {
  int64_t period = 1, spans = 0;
  std::vector<int32_t> pixel;
  std::vector<kernels::PixelStore> stores;
  std::vector<kernels::StoreRange> vectors;
};

// The outputs of `period` images as squares of 4 x 4, the last of a row or column going over the edge: in blocks that
// are done at a time. The squares of a block that stand side by side in x are a run; a group is as many as make whole
// vectors of pixels, vector r of it the r-th rows of its squares one behind the other.
struct SquareTiles {
  struct Run {
    int64_t image, row, column;  // of the first output
    int first, tiles;            // in its block
  };
  struct Group {
    int first, tiles;  // in its block
    kernels::StoreRange rows[4];
  };
  struct Block {
    int64_t first_run, runs, first_group, groups;
    int tiles;
  };
  int64_t period = 1;
  std::vector<Run> runs;
  std::vector<Group> groups;
  std::vector<Block> blocks;
  std::vector<kernels::PixelStore> stores;
};

// In a window of one vector are consecutive places of x, those between outputs included: stride 1. In a larger one
// consecutive outputs. limit: the last offset in x from which a window may be read.
struct Cut {
  int window = 1;
  int64_t period = 1, limit = 0;
  int most = 1;  // vectors in a tile
};
// Whether x has no room for what the kernel reaches beyond it.
bool has_edges(const ConvPlanes& planes, const KernelSize& kernel);
// PixelTiles::inside, for tiles of these planes.
std::vector<uint16_t> inside_of(const ConvPlanes& planes, const KernelSize& kernel, const Cut& cut, int lanes);

struct CutSize {
  // Stores of a whole vector (the halo in it included), of less, and vectors of two rows (PixelVector::run).
  int64_t vectors = 0, whole = 0, pieces = 0, runs = 0;
  int rest = 0;  // pixels of the last vector, where it is not full and has them in order
  int most = 1;  // Cut::most
  kernels::Reads reads = kernels::Reads::kWindow1;  // of most
};
CutSize size_of(const ConvPlanes& planes, const Cut& cut, int lanes);
// rest: whether the last vector, which CutSize::rest tells of, becomes a tile by itself.
PixelTiles cut_vectors(const ConvPlanes& planes, const Cut& cut, int lanes, bool rest = false);

// most: tiles in a block. lanes: of a vector of pixels, of a run of tiles.
SquareTiles cut_squares(const ConvPlanes& planes, int64_t period, int64_t most, int pixel_lanes, int run_lanes);

FilterTiles cut_pixels(const ConvPlanes& planes, int64_t period, int lanes);

}  // namespace structadmm
