// Sums, differences, products and quotients of tensors, constants and sizes.
#include "runtime/lowering.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace structadmm::runtime::lowering {

Item Lowering::arithmetic(const Call& call, const std::string& verb, bool in_place) {
  const Arguments a(call, {"a", "b", "alpha", "rounding_mode", "input", "other", "self"});
  SADMM_CHECK(a.number("alpha", 1) == 1, "alpha got ", a.number("alpha", 1), ", wanted 1");
  a.without("rounding_mode");
  SADMM_CHECK(call.args.size() <= 2, "args got ", call.args.size(), ", wanted 2");
  const Value* left = call.args.empty() ? a.find("input") : &call.args[0];
  const Value* right = call.args.size() < 2 ? a.find("other") : &call.args[1];
  SADMM_CHECK(left && right, "args got ", call.args.size(), ", wanted 2");
  const bool tensors[] = {is_tensor(left), is_tensor(right)};
  if (!tensors[0] && !tensors[1]) return size_arithmetic(*left, *right, verb);
  SADMM_CHECK(verb != "floordiv", "function got ", call.target, " of tensors, wanted one that the runtime has");
  SADMM_CHECK(!in_place || tensors[0], "x got a constant to overwrite, wanted a tensor");
  Item result = tensors[0] && tensors[1] ? of_tensors(operand(*left), operand(*right), verb)
                                         : with_constant(*left, *right, verb, tensors[0]);
  if (in_place) overwrite(*left);
  return result;
}

Item Lowering::size_arithmetic(const Value& left, const Value& right, const std::string& verb) {
  const auto size_of = [&](const Value& v) {
    if (v.is(VK::kInt)) return number(v.integer).size;
    SADMM_CHECK(v.is(VK::kNode) && item(v).kind == Item::Kind::kSize, "argument got ", shown(v),
                ", wanted a tensor or a size");
    return item(v).size;
  };
  const Size a = size_of(left), b = size_of(right);
  Item out = number(1);
  if (verb == "mul") {
    out.size = product(a, b);
  } else if (a.is_number() && b.is_number() && std::abs(a.number) < int64_t{1} << 40 &&
             std::abs(b.number) < int64_t{1} << 40 &&
             (verb == "add" || verb == "sub" || (verb == "floordiv" && b.number > 0 && a.number >= 0))) {
    out.size.number = verb == "add" ? a.number + b.number : verb == "sub" ? a.number - b.number : a.number / b.number;
  } else {
    out.size.opaque = true;
  }
  return out;
}

Item Lowering::of_tensors(Item x, Item y, const std::string& verb) {
  SADMM_CHECK(verb != "div", "div got two tensors, wanted a constant divisor");
  SADMM_CHECK(x.maps == y.maps, "x got [N, C] and [N, C, H, W], wanted one of them");
  SADMM_CHECK(x.channels < 0 || y.channels < 0 || x.channels == y.channels, "x got ", x.channels, " and ", y.channels,
              " channels, wanted the same");
  if (verb == "mul") {
    if (is_pixel(x) && !is_pixel(y)) std::swap(x, y);
    Item out = like(x, node_of(Kind::kMultiply, {x.value, y.value}));
    if (out.channels < 0) out.channels = y.channels;
    return out;
  }
  SADMM_CHECK(is_pixel(x) == is_pixel(y), "x got maps and maps of one pixel, wanted the same sizes");
  if (verb == "sub") y = scale_shift(y, constants(y, -1), constants(y, 0));
  Node node = node_of(Kind::kCopy, {x.value, y.value});
  node.epilogue.residual = true;
  Item out = like(x, std::move(node));
  if (out.channels < 0) out.channels = y.channels;
  return out;
}

Item Lowering::with_constant(const Value& left, const Value& right, const std::string& verb, bool tensor_first) {
  const Item x = operand(tensor_first ? left : right);
  const std::vector<double> c = per_channel(x, tensor_first ? right : left);
  std::vector<double> scale = constants(x, 1), shift = constants(x, 0);
  SADMM_CHECK(verb != "div" || tensor_first, "div got a tensor as divisor, wanted a constant");
  for (size_t i = 0; i < c.size(); ++i) {
    if (verb == "add") shift[i] = c[i];
    if (verb == "sub") shift[i] = tensor_first ? -c[i] : c[i];
    if (verb == "sub" && !tensor_first) scale[i] = -1;
    if (verb == "mul") scale[i] = c[i];
    if (verb == "div") scale[i] = 1 / c[i];
  }
  return scale_shift(x, std::move(scale), std::move(shift));
}

std::vector<double> Lowering::per_channel(const Item& x, const Value& v) {
  if (v.is_number()) return constants(x, v.number);
  SADMM_CHECK(is_constant(&v), "argument got ", shown(v), ", wanted a tensor or a number");
  const Stored& t = *item(v).constant;
  SADMM_CHECK(t.element <= format::Element::kBf16, "constant got ", format::element_name(t.element),
              ", wanted a floating dtype");
  const size_t dims = x.maps ? 4 : 2;
  SADMM_CHECK(t.shape.size() <= dims, "constant got ", t.shape.size(), " dimensions, wanted at most ", dims);
  const std::vector<float> values = t.numel() <= x.channels ? format::as_floats(t) : std::vector<float>();
  if (values.size() == 1) return constants(x, values[0]);
  const auto at = static_cast<int64_t>(t.shape.size()) - (x.maps ? 3 : 1);
  SADMM_CHECK(x.channels >= 0 && t.numel() == x.channels && at >= 0 && t.shape[static_cast<size_t>(at)] == x.channels,
              "constant got ", t.numel(), " values, wanted one, or one for each of ", x.channels, " channels");
  return {values.begin(), values.end()};
}

std::vector<double> Lowering::constants(const Item& x, double value) {
  check_channels(x);
  return std::vector<double>(static_cast<size_t>(x.channels), value);
}

Item Lowering::scale_shift(const Item& x, std::vector<double> scale, std::vector<double> shift) {
  const auto n = static_cast<int64_t>(scale.size());
  SADMM_CHECK(x.channels < 0 || x.channels == n, "x got ", x.channels, " channels, wanted ", n);
  Node node = node_of(Kind::kScaleShift, {x.value});
  Item y = like(x, std::move(node), {std::move(scale), std::move(shift)});
  y.channels = n;
  return y;
}

}  // namespace structadmm::runtime::lowering
