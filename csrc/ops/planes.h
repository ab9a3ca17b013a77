// How an activation lies in memory inside a segment: planes of pixels between zeros.
//
//   element (n, c, y, x) is at  origin + n * image_stride + c * channel_stride + y * pitch + x     (elements, not
//   bytes)
//
// Columns are neighbours in memory, always. Around each plane lies a halo of zeros, as wide as its consumers' padding,
// so that a convolution reads x at -halo.left <= x < width + halo.right without a test for the border. Halos are
// shared: the zeros that trail a row also lead the next (pitch = width + max(left, right)), and so for images of one
// channel.
//
// Who writes planes writes every element inside, and may write zeros, nothing else, on the halo. The zeros themselves
// are there before the first run: the planner gives one place in memory only to values of the same planes.
//
// A vector of features (the input and output of a linear layer) is planes with height = width = 1 and channel_stride
// = 1. A contiguous NCHW tensor is planes without halo, with pitch = width.
//
// Planes *in lanes* lie as vectors that need no transposition: maps are cut into grid.rows x grid.cols equal
// rectangles, and those of grid.images images lie side by side, one to each lane of a vector. Pixel (i, j) of all
// rectangles is at
//   n / grid.images * image_stride + c * channel_stride + i * pitch + j * grid.lanes()
// They have no halo: what a rectangle reads of its neighbours is a permutation of lanes away, or zero. Lanes without an
// image may hold anything.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/tensor_view.h"

namespace structadmm {

struct Halo {
  int64_t top = 0, left = 0, bottom = 0, right = 0;
  bool operator==(const Halo&) const = default;
};

struct Grid {
  int64_t images = 0, rows = 1, cols = 1;  // no images: not in lanes
  int64_t lanes() const { return images * rows * cols; }
  bool operator==(const Grid&) const = default;
};

struct Planes {
  Dtype dtype = Dtype::kF32;  // f32 or bf16
  int64_t channels = 0, height = 0, width = 0;
  Halo halo;
  int64_t pitch = 0, image_stride = 0, channel_stride = 0, origin = 0;
  // Elements from the pointer on that may be read, halos included: kernels may load whole vectors as long as they stay
  // in [0, readable). Planes of the arena leave room for kSlack elements behind the last plane.
  int64_t readable = 0;
  Grid grid = {};
  bool past_caches = false;  // of the caller's tensors: all images are more than caches keep until they are read
  bool operator==(const Planes&) const = default;

  bool in_lanes() const { return grid.images > 0; }

  int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    if (in_lanes()) {
      const int64_t h = height / grid.rows, w = width / grid.cols;
      const int64_t lane = (n % grid.images * grid.rows + y / h) * grid.cols + x / w;
      return n / grid.images * image_stride + c * channel_stride + y % h * pitch + x % w * grid.lanes() + lane;
    }
    return origin + n * image_stride + c * channel_stride + y * pitch + x;
  }
};

inline constexpr int64_t kSlack = 128;

// Planes for `images` images as the arena holds them: per channel all images one below the other, channels an odd
// number of cache lines apart (a power of two would let planes share few cache sets).
inline Planes arena_planes(Dtype dtype, int64_t images, int64_t channels, int64_t height, int64_t width, Halo halo) {
  Planes p{.dtype = dtype, .channels = channels, .height = height, .width = width, .halo = halo};
  if (height == 1 && width == 1 && halo == Halo{}) {
    p.pitch = p.channel_stride = 1;
    p.image_stride = channels;
    p.readable = images * channels + kSlack;
    return p;
  }
  const int64_t side = std::max(halo.left, halo.right), between = std::max(halo.top, halo.bottom);
  p.pitch = width + side;
  p.image_stride = (height + between) * p.pitch;
  p.origin = halo.top * p.pitch + halo.left;
  const int64_t line = 64 / dtype_size(dtype);
  const int64_t plane = halo.top * p.pitch + halo.left + images * p.image_stride + halo.right;
  p.channel_stride = (((plane + line - 1) / line) | 1) * line;
  p.readable = channels * p.channel_stride + kSlack;
  return p;
}

// In lanes, channels an odd number of vectors apart. The grid divides the map.
inline Planes lane_planes(Dtype dtype, int64_t images, int64_t channels, int64_t height, int64_t width, Grid grid) {
  Planes p{.dtype = dtype, .channels = channels, .height = height, .width = width, .halo = {}};
  p.grid = grid;
  p.pitch = width / grid.cols * grid.lanes();
  p.channel_stride = (height / grid.rows * (width / grid.cols) | 1) * grid.lanes();
  p.image_stride = channels * p.channel_stride;
  p.readable = (images + grid.images - 1) / grid.images * p.image_stride;
  return p;
}

// A contiguous NCHW tensor.
inline Planes tensor_planes(Dtype dtype, int64_t images, int64_t channels, int64_t height, int64_t width) {
  return {.dtype = dtype,
          .channels = channels,
          .height = height,
          .width = width,
          .halo = {},
          .pitch = width,
          .image_stride = channels * height * width,
          .channel_stride = height * width,
          .origin = 0,
          .readable = images * channels * height * width};
}

}  // namespace structadmm
