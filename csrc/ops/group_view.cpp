#include "ops/group_view.h"

#include "base/check.h"

namespace structadmm {

GroupView make_group_view(const char* op, const std::string& structure, const TensorView& w, int64_t conv_groups,
                          int64_t block) {
  static constexpr const char* kNames[] = {"filter", "channel", "column", "block_column", "element"};
  int found = -1;
  for (int i = 0; i < 5; ++i) {
    if (structure == kNames[i]) found = i;
  }
  SADMM_CHECK(found >= 0, op, ": structure got '", structure,
              "', wanted one of filter, channel, column, block_column, element");
  SADMM_CHECK(w.dims >= 2 && w.numel() > 0, op, ": w got shape ", w.shape(),
              ", wanted [O, C/groups, *kernel] with positive sizes");
  SADMM_CHECK(conv_groups >= 1 && w.sizes[0] % conv_groups == 0, op, ": conv_groups got ", conv_groups,
              ", wanted a divisor of the ", w.sizes[0], " filters");
  SADMM_CHECK(block >= 1, op, ": block got ", block, ", wanted at least 1");

  GroupView v{};
  v.structure = static_cast<Structure>(found);
  v.filters = w.sizes[0];
  v.channels = w.sizes[1];
  v.row = w.numel() / v.filters;
  v.taps = v.row / v.channels;
  v.conv_groups = conv_groups;
  v.group_filters = v.filters / conv_groups;
  switch (v.structure) {
    case Structure::kFilter:
    case Structure::kElement:
      v.band_filters = 1;
      break;
    case Structure::kChannel:
    case Structure::kColumn:
      v.band_filters = v.group_filters;
      break;
    case Structure::kBlockColumn:
      v.band_filters = block < v.group_filters ? block : v.group_filters;
      break;
  }
  v.bands_per_group = (v.group_filters + v.band_filters - 1) / v.band_filters;
  v.bands = v.conv_groups * v.bands_per_group;
  switch (v.structure) {
    case Structure::kFilter:
      v.groups = v.filters;
      break;
    case Structure::kChannel:
      v.groups = v.conv_groups * v.channels;
      break;
    default:
      v.groups = v.bands * v.row;
  }
  return v;
}

Rows make_rows(const TensorView& t) {
  Rows rows;
  rows.data = static_cast<char*>(t.data);
  rows.dtype = t.dtype;
  rows.row_stride = t.strides[0];
  // A dimension of size 1 is never stepped along, so its stride says nothing.
  const auto fits = [&](int dim, int64_t stride) { return t.sizes[dim] == 1 || t.strides[dim] == stride; };
  int64_t step = 1;
  rows.logical = true;
  for (int d = t.dims - 1; d >= 1; --d) {
    rows.logical = rows.logical && fits(d, step);
    step *= t.sizes[d];
  }
  step = 1;
  rows.channels_last = t.dims > 1 && fits(1, 1);
  if (t.dims > 1) step = t.sizes[1];
  for (int d = t.dims - 1; d >= 2; --d) {
    rows.channels_last = rows.channels_last && fits(d, step);
    step *= t.sizes[d];
  }
  return rows;
}

std::vector<int64_t> make_offsets(const TensorView& t, Order order) {
  const int64_t n = t.numel() / t.sizes[0];
  std::vector<int64_t> offsets(static_cast<size_t>(n), 0);
  int64_t repeat = 1;  // how many consecutive positions share an index of this dimension
  const auto add = [&](int d) {
    for (int64_t m = 0; m < n; ++m) offsets[static_cast<size_t>(m)] += m / repeat % t.sizes[d] * t.strides[d];
    repeat *= t.sizes[d];
  };
  if (t.dims > 1 && order == Order::kChannelsLast) add(1);
  for (int d = t.dims - 1; d >= (order == Order::kChannelsLast ? 2 : 1); --d) add(d);
  return offsets;
}

}  // namespace structadmm
