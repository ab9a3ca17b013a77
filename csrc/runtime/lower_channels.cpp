// Channels picked, padded and joined: slices, chunk, shuffle, pad, cat.
#include "runtime/lowering.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace structadmm::runtime::lowering {

Item Lowering::plain(Item x) {
  if (!x.picked) return x;
  const auto out = static_cast<int64_t>(x.pick.size());
  const Item base = base_of(x);
  bool all = out == base.channels;
  for (int64_t c = 0; c < out && all; ++c) all = x.pick[static_cast<size_t>(c)] == c;
  Node node;
  node.inputs = {x.value};
  if (all) {
    node.kind = Kind::kPool;
    for (int d = 0; d < 2; ++d) node.pool.stride[d] = x.stride[d];
  } else {
    ConvSpec spec;
    spec.in_channels = base.channels;
    spec.out_channels = out;
    for (int d = 0; d < 2; ++d) spec.stride[d] = x.stride[d];
    spec.block_taps.push_back(0);
    for (int64_t c = 0; c < out;) {  // filters without a tap are one block
      int64_t end = c + 1;
      while (x.pick[c] < 0 && end < out && x.pick[end] < 0) ++end;
      if (x.pick[c] >= 0) {
        spec.taps.push_back(static_cast<int32_t>(x.pick[c]));
        spec.weight.push_back(1.0f);
      }
      spec.block_filters.push_back(static_cast<int32_t>(end - c));
      spec.block_taps.push_back(static_cast<int32_t>(spec.taps.size()));
      c = end;
    }
    node.kind = Kind::kConv;
    node.conv = std::make_shared<ConvSpec>(std::move(spec));
  }
  const int storage = x.storage;
  Item y = tensor(add(std::move(node)), true, out, x.height, x.width);
  y.storage = storage;
  return y;
}

Item Lowering::base_of(const Item& x) const {
  Item base = x;
  base.channels = channels_of_.at(x.value);
  return base;
}

void Lowering::check_channels(const Item& x) {
  SADMM_CHECK(x.channels >= 0, "x got an unknown number of channels, wanted the shapes of inputs in the file");
  SADMM_CHECK(x.channels <= kMany, "x got ", x.channels, " channels, wanted at most ", kMany);
}

Item Lowering::picked(const Value& v) {
  Item x = any_tensor(v);
  SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
  SADMM_CHECK(!x.pad[0] && !x.pad[1], "x got zeros around it, wanted them before a convolution");
  check_channels(x);
  if (!x.picked) {
    channels_of_[x.value] = x.channels;
    x.picked = true;
    for (int64_t c = 0; c < x.channels; ++c) x.pick.push_back(c);
  }
  return x;
}

Item Lowering::slice(const Value& v, const Value& index) {
  const std::vector<Value> one = {index};
  const std::vector<Value>& parts = index.is_sequence() ? index.items : one;
  if (!any_tensor(v).maps) {
    const bool unflatten =
        parts.size() == 4 && is_all(parts[0]) && is_all(parts[1]) && parts[2].is_null() && parts[3].is_null();
    SADMM_CHECK(unflatten, "index got parts of [N, C], wanted [:, :, None, None]");
    return unflat(operand(v));
  }
  SADMM_CHECK(parts.size() <= 4, "index got ", parts.size(), " dimensions, wanted 4");
  Item x = picked(v);
  for (size_t d = 0; d < parts.size(); ++d) {
    const Value& s = parts[d];
    if (s.is(VK::kEllipsis)) {
      SADMM_CHECK(d + 1 == parts.size(), "index got an ellipsis before others, wanted it last");
      break;
    }
    SADMM_CHECK(s.is(VK::kSlice), "index got ", shown(s), ", wanted slices");
    if (is_all(s)) continue;
    SADMM_CHECK(d > 0, "index got a part of the batch, wanted all of it");
    if (d == 1) {
      SADMM_CHECK(s.items[2].is_null() || (s.items[2].is(VK::kInt) && s.items[2].integer == 1), "step got ",
                  shown(s.items[2]), ", wanted 1 along channels");
      const auto [begin, end] = range(s, x.channels);
      SADMM_CHECK(begin < end, "index got no channel, wanted some");
      x.pick = {x.pick.begin() + begin, x.pick.begin() + end};
      x.channels = end - begin;
    } else {
      SADMM_CHECK(s.items[0].is_null() || (s.items[0].is(VK::kInt) && s.items[0].integer == 0), "slice got ",
                  shown(s.items[0]), ", wanted whole rows and columns with a step");
      SADMM_CHECK(s.items[1].is_null(), "slice got ", shown(s.items[1]), ", wanted whole rows and columns with a step");
      SADMM_CHECK(s.items[2].is(VK::kInt) && s.items[2].integer >= 1 && s.items[2].integer < kFar, "step got ",
                  shown(s.items[2]), ", wanted 1 to ", kFar - 1);
      const int64_t step = s.items[2].integer;
      x.stride[d - 2] *= step;
      SADMM_CHECK(x.stride[d - 2] < kFar, "step got ", x.stride[d - 2], ", wanted less than ", kFar);
      int64_t& size = d == 2 ? x.height : x.width;
      if (size >= 0) size = (size - 1) / step + 1;
    }
  }
  return x;
}

Item Lowering::chunk(const Value& v, int64_t chunks, int64_t dim) {
  SADMM_CHECK(dim == 1 || dim == -3, "dim got ", dim, ", wanted 1");
  const Item x = picked(v);
  SADMM_CHECK(chunks >= 1 && chunks <= x.channels, "chunks got ", chunks, ", wanted 1 to ", x.channels);
  const int64_t size = (x.channels + chunks - 1) / chunks;
  Item bare = x;
  bare.pick.clear();
  Item out;
  out.kind = Item::Kind::kList;
  for (int64_t begin = 0; begin < x.channels; begin += size) {
    Item part = bare;
    part.pick = {x.pick.begin() + begin, x.pick.begin() + std::min(begin + size, x.channels)};
    part.channels = static_cast<int64_t>(part.pick.size());
    out.list.push_back(std::move(part));
  }
  return out;
}

Item Lowering::shuffle(const Value& v, int64_t groups) {
  Item x = picked(v);
  SADMM_CHECK(x.channels % groups == 0, "groups got ", groups, ", wanted a divisor of ", x.channels, " channels");
  std::vector<int64_t> pick;
  for (int64_t c = 0; c < x.channels; ++c) {
    pick.push_back(x.pick[static_cast<size_t>(c % groups * (x.channels / groups) + c / groups)]);
  }
  x.pick = std::move(pick);
  x.storage = at_;
  return x;
}

Item Lowering::pad(const Value& v, std::vector<int64_t> widths) {
  SADMM_CHECK(widths.size() % 2 == 0 && widths.size() <= 6, "pad got ", widths.size(), " widths, wanted 2, 4 or 6");
  widths.resize(6);
  for (const int64_t w : widths) SADMM_CHECK(w < kFar, "pad got ", w, ", wanted less than ", kFar);
  SADMM_CHECK(widths[0] == widths[1] && widths[2] == widths[3],
              "pad got different widths on opposite sides, wanted the same");
  Item x = any_tensor(v);
  SADMM_CHECK(x.maps, "x got [N, C], wanted [N, C, H, W]");
  if (widths[4] || widths[5]) {
    x = picked(v);
    x.pick.insert(x.pick.begin(), static_cast<size_t>(widths[4]), -1);
    x.pick.insert(x.pick.end(), static_cast<size_t>(widths[5]), -1);
    x.channels += widths[4] + widths[5];
    check_channels(x);
  }
  if (widths[0] || widths[2]) {
    for (const int c : consumers_[static_cast<size_t>(at_)]) {
      const Call& call = file_.graph[static_cast<size_t>(c)];
      const auto layer = file_.layers.find(call.target);
      const bool conv =
          call.target == "F.conv2d" || (layer != file_.layers.end() && layer->second.kind.ends_with("Conv2d"));
      SADMM_CHECK(conv, "pad got a consumer, ", call.name, ", that is no convolution, wanted convolutions alone");
      // padding='same' means the sizes that it sees, zeros included.
    }
    x.pad[0] += widths[2];
    x.pad[1] += widths[0];
    if (x.height >= 0) x.height += 2 * widths[2];
    if (x.width >= 0) x.width += 2 * widths[0];
  }
  x.storage = at_;
  return x;
}

Item Lowering::concat(const Value& tensors, int64_t dim) {
  SADMM_CHECK(tensors.is_sequence() && !tensors.items.empty(), "tensors got ", shown(tensors),
              ", wanted a list of them");
  Node node = node_of(Kind::kConcat, {});
  Item all;
  for (const Value& v : tensors.items) {
    const Item x = operand(v);
    node.inputs.push_back(x.value);
    if (node.inputs.size() == 1) {
      all = x;
      continue;
    }
    SADMM_CHECK(x.maps == all.maps, "tensors got [N, C] and [N, C, H, W], wanted one of them");
    all.channels = all.channels < 0 || x.channels < 0 ? -1 : all.channels + x.channels;
    if (all.height < 0) all.height = x.height;
    if (all.width < 0) all.width = x.width;
  }
  SADMM_CHECK(dim == 1 || dim == (all.maps ? -3 : -1), "dim got ", dim, ", wanted 1");
  return like(all, std::move(node));
}

}  // namespace structadmm::runtime::lowering
