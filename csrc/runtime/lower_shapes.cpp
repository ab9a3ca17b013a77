// Sizes as products that may stay open until data arrive, and the reshapes that they describe.
#include "runtime/lowering.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace structadmm::runtime::lowering {

Item Lowering::number(int64_t n) {
  Item item;
  item.kind = Item::Kind::kSize;
  item.size.number = n;
  return item;
}

Value Lowering::number_value(int64_t n) {
  Value v;
  v.kind = VK::kInt;
  v.integer = n;
  v.number = static_cast<double>(n);
  return v;
}

Size Lowering::product(Size a, const Size& b) {
  a.opaque = a.opaque || b.opaque || std::abs(static_cast<double>(a.number) * static_cast<double>(b.number)) > 1e15;
  a.number = a.opaque ? 1 : a.number * b.number;
  a.factors.insert(b.factors.begin(), b.factors.end());
  return a;
}

Item Lowering::dimension(const Item& x, int64_t d) {
  Item item = number(1);
  const int64_t known[] = {-1, x.channels, x.height, x.width};
  if (d == 0) {
    item.size.factors.insert({-1, 0});
  } else if (known[d] >= 0) {
    item.size.number = known[d];
  } else if (x.picked || x.pad[0] || x.pad[1]) {
    item.size.opaque = true;
  } else {
    item.size.factors.insert({x.value, static_cast<int>(d)});
  }
  return item;
}

Item Lowering::shape(const Value& v) {
  const Item& x = item(v);
  SADMM_CHECK(x.kind == Item::Kind::kTensor, "x got no tensor, wanted one");
  Item out;
  out.kind = Item::Kind::kList;
  for (int64_t d = 0; d < (x.maps ? 4 : 2); ++d) out.list.push_back(dimension(x, d));
  return out;
}

Item Lowering::size(const Arguments& a) {
  Item all = shape(a.get("self"));
  const Value* dim = a.find("dim");
  if (!dim) return all;
  return at(all, a.whole("dim", 0));
}

Item Lowering::at(const Item& list, int64_t i) {
  const auto n = static_cast<int64_t>(list.list.size());
  SADMM_CHECK(i >= -n && i < n, "index got ", i, ", wanted less than ", n);
  return list.list[static_cast<size_t>(i < 0 ? i + n : i)];
}

std::pair<int64_t, int64_t> Lowering::range(const Value& s, int64_t n) {
  const auto bound = [&](const Value& v, int64_t other) {
    if (v.is_null()) return other;
    SADMM_CHECK(v.is(VK::kInt), "slice got ", shown(v), ", wanted integers");
    return std::clamp<int64_t>(v.integer < 0 ? v.integer + n : v.integer, 0, n);
  };
  const int64_t begin = bound(s.items[0], 0), end = bound(s.items[1], n);
  return {begin, std::max(begin, end)};
}

bool Lowering::is_all(const Value& s) {
  return s.is(VK::kEllipsis) ||
         (s.is(VK::kSlice) && s.items[0].is_null() && s.items[1].is_null() && s.items[2].is_null());
}

Item Lowering::getitem(const Arguments& a) {
  const Item from = item(a.get("a"));
  const Value& index = a.get("b");
  if (from.kind == Item::Kind::kTensor) return slice(a.get("a"), index);
  SADMM_CHECK(from.kind == Item::Kind::kList, "x got no list, wanted one");
  if (index.is(VK::kInt)) return at(from, index.integer);
  SADMM_CHECK(index.is(VK::kSlice) && index.items[2].is_null(), "index got ", shown(index),
              ", wanted a number or a slice");
  const auto n = static_cast<int64_t>(from.list.size());
  const auto [begin, end] = range(index, n);
  Item out;
  out.kind = Item::Kind::kList;
  for (int64_t i = begin; i < end; ++i) out.list.push_back(from.list[static_cast<size_t>(i)]);
  return out;
}

Item Lowering::flat(const Item& x, int64_t features) {
  if (!x.maps) return x;
  Node node = node_of(Kind::kFlatten, {x.value});
  node.features = features;
  const bool known = x.channels >= 0 && x.height >= 0 && x.width >= 0;
  const int64_t n = known ? x.channels * x.height * x.width : features > 0 ? features : -1;
  SADMM_CHECK(!features || features == n, "shape got ", features, " features, wanted ", n);
  Item y = tensor(add(std::move(node)), false, n);
  y.storage = x.storage;
  return y;
}

Item Lowering::unflat(const Item& x) {
  if (x.maps) return x;
  Item y = adaptive_pool(x, false, 1, 1);
  y.storage = x.storage;
  return y;
}

Item Lowering::flatten(const Value& v, int64_t start, int64_t end) {
  const Item x = operand(v);
  const int64_t dims = x.maps ? 4 : 2;
  SADMM_CHECK(start == 1 || start == 1 - dims, "start_dim got ", start, ", wanted 1");
  SADMM_CHECK(end == -1 || end == dims - 1, "end_dim got ", end, ", wanted -1");
  return flat(x, 0);
}

Item Lowering::view(const Call& call) {
  SADMM_CHECK(!call.args.empty(), "args got none, wanted a tensor");
  const Item x = operand(call.args[0]);
  std::vector<Item> sizes;
  const auto take = [&](const Value& v) {
    if (v.is(VK::kInt)) {
      sizes.push_back(number(v.integer));
    } else {
      const Item& i = item(v);
      if (i.kind == Item::Kind::kList) {
        sizes.insert(sizes.end(), i.list.begin(), i.list.end());
      } else {
        sizes.push_back(i);
      }
    }
  };
  SADMM_CHECK(
      call.kwargs.empty() || (call.kwargs.size() == 1 && call.kwargs.contains("shape") && call.args.size() == 1),
      "argument got another name, wanted shape");
  for (size_t i = 1; i < call.args.size(); ++i) {
    if (!call.args[i].is_sequence()) take(call.args[i]);
    for (const Value& v : call.args[i].items) take(v);
  }
  for (const auto& [name, v] : call.kwargs) {
    if (!v.is_sequence()) take(v);
    for (const Value& s : v.items) take(s);
  }
  for (const Item& s : sizes) {
    SADMM_CHECK(s.kind == Item::Kind::kSize && !s.size.opaque, "shape got something else, wanted sizes");
  }
  SADMM_CHECK(sizes.size() == 2 || sizes.size() == 4, "shape got ", sizes.size(), " dimensions, wanted 2 or 4");

  // What one image has, as a product; one size may be -1 and is what is left.
  Size image = dimension(x, 1).size;
  for (int64_t d = 2; d < (x.maps ? 4 : 2); ++d) image = product(image, dimension(x, d).size);
  const auto is_free = [](const Item& s) { return s.size.is_number() && s.size.number == -1; };
  const bool free_batch = is_free(sizes[0]);
  SADMM_CHECK(free_batch || sizes[0].size.is_batch(), "shape got a fixed batch, wanted the size of dimension 0, or -1");
  Size rest = number(1).size;
  bool free = false;
  for (size_t d = 1; d < sizes.size(); ++d) {
    if (is_free(sizes[d])) {
      SADMM_CHECK(!free && !free_batch, "shape got -1 twice, wanted it once");
      free = true;
    } else {
      rest = product(rest, sizes[d].size);
    }
  }
  const bool same = rest.number == image.number && rest.factors == image.factors;
  if (sizes.size() == 4) {
    for (size_t d = 2; d < 4; ++d) {
      SADMM_CHECK(sizes[d].size.is_number() && sizes[d].size.number == 1,
                  "shape got maps, wanted [N, C, 1, 1] or [N, C]");
    }
    SADMM_CHECK(!x.maps || is_pixel(x), "x got [N, C, H, W], wanted [N, C] or maps of one pixel");
    SADMM_CHECK(free || same || image.factors.size() == 1, "shape got other sizes, wanted those of x");
    return x.maps ? x : unflat(x);
  }
  if (free || same) return flat(x, 0);
  // A number of features, where the sizes of maps are not known yet: the runtime checks it.
  SADMM_CHECK(rest.is_number() && rest.number > 0 && !image.is_number() && x.maps,
              "shape got other sizes, wanted all of an image in one");
  return flat(x, rest.number);
}

}  // namespace structadmm::runtime::lowering
