// The weight of a specification (ConvSpec, LinearSpec) as the table that tap_table.h checks and packs.
#pragma once

#include <algorithm>

#include "ops/conv.h"
#include "ops/steps.h"
#include "ops/tap_table.h"

namespace structadmm {

template <class Spec>
TapTable table_of(const Spec& s, int64_t in_channels) {
  TapTable t;
  t.weight = s.weight;
  t.has_bias = !s.bias.empty();
  t.bias = s.bias;
  t.taps = s.taps;
  t.block_filters = s.block_filters;
  t.block_taps = s.block_taps;
  t.in_channels = in_channels;
  return t;
}

inline TapTable table_of(const LinearSpec& s) {
  return table_of(s, s.in_features);
}

inline TapTable table_of(const ConvSpec& s) {
  TapTable t = table_of(s, s.in_channels);
  std::copy_n(s.kernel, 2, t.kernel_size);
  t.conv_groups = s.groups;
  return t;
}

}  // namespace structadmm
