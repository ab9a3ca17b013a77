// The packed weight as it lies in memory: a header, and behind it, at the offsets it names, panels, taps, the channels
// that some tap reads, weights and bias. Written by ops/tap_table.cpp; read by it and by the CUDA kernel.
#pragma once

#include <cstdint>

namespace structadmm::kernels {

struct Tap {
  int32_t channel;   // absolute input channel
  int32_t position;  // flat kernel position
};

struct Panel {
  int32_t first_filter, filters, width, block;
  int64_t first_tap, n_taps;
  int64_t weight;  // index of its first weight
};

struct PackedHeader {
  char magic[8];
  int32_t layout;
  int32_t in_channels, out_channels, conv_groups, kernel_h, kernel_w;
  uint64_t structure;  // hash of these sizes, the panels and the taps: what a plan depends on, besides the input
  int64_t bytes;
  int64_t panels, taps, channels, weights;                       // counts
  int64_t panels_at, taps_at, channels_at, weights_at, bias_at;  // byte offsets
};

}  // namespace structadmm::kernels
