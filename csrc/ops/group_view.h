// How a weight [O, Cg, *kernel] with G conv groups is divided into the groups of a pruning structure, and how it lies
// in memory. With N = Cg * prod(kernel), j the flat logical index of (c, *kernel), Og = O/G and blocks of B filters:
//
//   structure      groups             number of a weight's group
//   filter         O                  o
//   channel        G*Cg               g*Cg + c
//   column         G*N                g*N + j
//   block_column   G*ceil(Og/B)*N     (g*ceil(Og/B) + b)*N + j      the last block of a conv group may be shorter
//   element        O*N                o*N + j
//
// All but filter come from one shape: bands of consecutive filters (a conv group, a block, one filter), and in a band
// one *cell* per j. Cells are the groups of column, block_column and element, and parts of those of channel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/tensor_view.h"

namespace structadmm {

enum class Structure { kFilter, kChannel, kColumn, kBlockColumn, kElement };

struct GroupView {
  Structure structure;
  int64_t filters;          // O
  int64_t channels;         // Cg
  int64_t taps;             // prod(kernel)
  int64_t row;              // N
  int64_t conv_groups;      // G
  int64_t group_filters;    // Og
  int64_t band_filters;     // filters of a full band (1 for filter and element)
  int64_t bands_per_group;  // bands of a conv group
  int64_t bands;            // in all
  int64_t groups;           // of the structure

  int64_t band_begin(int64_t band) const {
    return band / bands_per_group * group_filters + band % bands_per_group * band_filters;
  }
  int64_t band_end(int64_t band) const {
    const int64_t group_end = (band / bands_per_group + 1) * group_filters;
    const int64_t end = band_begin(band) + band_filters;
    return end < group_end ? end : group_end;
  }
  int64_t band_of(int64_t filter) const {
    return filter / group_filters * bands_per_group + filter % group_filters / band_filters;
  }
};

// Throws Error, naming the op, for a structure that does not exist or numbers that do not fit w's shape.
GroupView make_group_view(const char* op, const std::string& structure, const TensorView& w, int64_t conv_groups,
                          int64_t block);

// In which order a row's weights lie in memory.
enum class Order { kLogical, kChannelsLast };

// Position in memory order -> j.
inline int64_t logical_index(const GroupView& view, Order order, int64_t m) {
  return order == Order::kLogical ? m : m % view.channels * view.taps + m / view.channels;
}

// A tensor of the weight's shape as rows: filter o begins at data + o * row_stride elements. If a row is dense in an
// order, position m of that order is m elements on.
struct Rows {
  char* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t row_stride = 0;
  bool logical = false;
  bool channels_last = false;  // both may hold

  bool dense(Order order) const { return order == Order::kLogical ? logical : channels_last; }
};

Rows make_rows(const TensorView& t);

// For a tensor whose rows are not dense in the order: position m -> elements from the row's beginning.
std::vector<int64_t> make_offsets(const TensorView& t, Order order);

}  // namespace structadmm
