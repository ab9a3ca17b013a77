// Whether the configuration and the tensors of a layer are what its kind allows.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>

#include "format/allowed.h"

namespace structadmm::format {
namespace {

using Type = Field::Type;
using VK = Value::Kind;

// Sizes and counts stay below this, so that products of a few of them are far from overflow.
constexpr int64_t kLimit = int64_t{1} << 31;
// Of a recurrent module: its tensors are counted before any is looked for.
constexpr int64_t kMaxLayers = 64;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

bool is_int(const Value& v, int64_t low) {
  return v.is(VK::kInt) && v.integer >= low && v.integer < kLimit;
}

bool is_finite(const Value& v) {
  return v.is_number() && std::isfinite(v.number);
}

bool are_ints(const Value& v, size_t n, int64_t low) {
  return v.is(VK::kList) && v.items.size() == n &&
         std::ranges::all_of(v.items, [=](const Value& i) { return is_int(i, low); });
}

bool is_one_of(const Value& v, std::initializer_list<std::string_view> choices) {
  return v.is(VK::kString) && std::ranges::find(choices, v.text) != choices.end();
}

bool fits(const Field& f, const Value& v) {
  const size_t n = static_cast<size_t>(f.n);
  switch (f.type) {
    case Type::kCount:
      return is_int(v, 1);
    case Type::kNatural:
      return is_int(v, 0);
    case Type::kDim:
      return is_int(v, 1 - kLimit);
    case Type::kBool:
      return v.is(VK::kBool);
    case Type::kFloat:
      return is_finite(v);
    case Type::kProbability:
      return is_finite(v) && v.number >= 0 && v.number <= 1;
    case Type::kCountOrNull:
      return v.is_null() || is_int(v, 1);
    case Type::kFloatOrNull:
      return v.is_null() || is_finite(v);
    case Type::kSizes:
      return are_ints(v, n, 1);
    case Type::kNaturals:
      return are_ints(v, n, 0);
    case Type::kPadding:
      return are_ints(v, n, 0) || is_one_of(v, {"same", "valid"});
    case Type::kPaddingMode:
      return is_one_of(v, {"zeros", "reflect", "replicate", "circular"});
    case Type::kApproximate:
      return is_one_of(v, {"none", "tanh"});
    case Type::kAdaptive:
      return v.is(VK::kList) && v.items.size() == n &&
             std::ranges::all_of(v.items, [](const Value& i) { return i.is_null() || is_int(i, 1); });
    case Type::kShape:
      return v.is(VK::kList) && !v.items.empty() && v.items.size() < 9 && are_ints(v, v.items.size(), 1);
  }
  return false;
}

std::string wanted_of(const Field& f) {
  switch (f.type) {
    case Type::kCount:
      return "an integer of at least 1";
    case Type::kNatural:
      return "an integer of at least 0";
    case Type::kDim:
      return "an integer";
    case Type::kBool:
      return "true or false";
    case Type::kFloat:
      return "a finite number";
    case Type::kProbability:
      return "a number in [0, 1]";
    case Type::kCountOrNull:
      return "null or an integer of at least 1";
    case Type::kFloatOrNull:
      return "null or a finite number";
    case Type::kSizes:
      return text(f.n, " integers of at least 1");
    case Type::kNaturals:
      return text(f.n, " integers of at least 0");
    case Type::kPadding:
      return text(f.n, " integers of at least 0, or one of same, valid");
    case Type::kPaddingMode:
      return "one of zeros, reflect, replicate, circular";
    case Type::kApproximate:
      return "one of none, tanh";
    case Type::kAdaptive:
      return text(f.n, " sizes or nulls");
    case Type::kShape:
      return "a list of sizes";
  }
  return "";
}

std::string shown(const Value& v) {
  switch (v.kind) {
    case VK::kNull:
      return "null";
    case VK::kBool:
      return v.truth ? "true" : "false";
    case VK::kInt:
      return std::to_string(v.integer);
    case VK::kFloat:
      return text(v.number);
    case VK::kString:
      return text("'", cut(v.text), "'");
    default: {
      if (!v.is(VK::kList) || v.items.size() > 8) return "another value";
      std::string out = "[";
      for (const Value& i : v.items) out += (out.size() > 1 ? ", " : "") + (i.items.empty() ? shown(i) : "[...]");
      return out + "]";
    }
  }
}

std::string shown(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (const int64_t s : shape) out += (out.size() > 1 ? ", " : "") + (s < 0 ? "any" : std::to_string(s));
  return out + "]";
}

// The tables of a compacted layer: see FORMAT.md, "Compacted weights".
std::string wrong_tables(const Layer& layer) {
  const Config& c = layer.config;
  const bool is_conv = c.contains("groups");
  const int64_t groups = is_conv ? whole(c, "groups") : 1;
  const int64_t filters = whole(c, is_conv ? "out_channels" : "out_features"), per_group = filters / groups;
  int64_t columns = is_conv ? whole(c, "in_channels") / groups : whole(c, "in_features");
  if (is_conv) {
    for (const Value& k : c.at("kernel_size").items) {
      columns = columns > kLimit ? columns : columns * k.integer;  // below 2^62
    }
  }
  const auto taps = as_int32(layer.tensors.at("taps")), sizes = as_int32(layer.tensors.at("block_filters")),
             offsets = as_int32(layer.tensors.at("block_taps"));
  if (sizes.empty()) return "block_filters got no block, wanted at least one";
  if (offsets.size() != sizes.size() + 1) {
    return text("block_taps got ", offsets.size(), " offsets, wanted ", sizes.size() + 1);
  }
  const auto n_taps = static_cast<int64_t>(taps.size());
  if (offsets[0] != 0) return text("block_taps[0] got ", offsets[0], ", wanted 0");
  int64_t filter = 0, weights = 0;
  for (size_t b = 0; b < sizes.size(); ++b) {
    if (sizes[b] < 1 || sizes[b] > filters - filter) {
      return text("block_filters[", b, "] got ", sizes[b], ", wanted positive sizes that add up to ", filters);
    }
    if (filter / per_group != (filter + sizes[b] - 1) / per_group) {
      return text("block_filters[", b, "] got a block across conv groups, wanted blocks of the ", per_group, " in one");
    }
    const int64_t begin = offsets[b], end = offsets[b + 1];
    if (end < begin || end > n_taps) {
      return text("block_taps[", b + 1, "] got ", end, ", wanted offsets from 0 up to ", n_taps);
    }
    for (int64_t i = begin, before = -1; i < end; ++i) {
      if (taps[i] < 0 || taps[i] >= columns) return text("taps[", i, "] got ", taps[i], ", wanted 0 to ", columns - 1);
      if (taps[i] <= before) return text("taps[", i, "] got ", taps[i], ", wanted taps that ascend within a block");
      before = taps[i];
    }
    filter += sizes[b];
    weights += sizes[b] * (end - begin);
  }
  if (filter != filters) return text("block_filters got ", filter, " filters, wanted sizes that add up to ", filters);
  if (offsets.back() != n_taps) return text("block_taps got ", offsets.back(), " at its end, wanted ", n_taps);
  const int64_t got = layer.tensors.at("weight").numel();
  return got == weights ? "" : text("weight got [", got, "], wanted [", weights, "] as its tables say");
}

}  // namespace

std::string cut(std::string_view text) {
  std::string out(text.substr(0, 60));
  for (char& c : out) c = c >= ' ' && c <= '~' ? c : '?';
  return text.size() > 60 ? out + "..." : out;
}

std::string wrong_config(const LayerKind& kind, const Config& config) {
  bool same = config.size() == kind.fields.size();
  std::string names;
  for (const Field& f : kind.fields) {
    same = same && config.contains(std::string(f.name));
    names += (names.empty() ? "" : ", ") + std::string(f.name);
  }
  if (!same) {
    std::string got;
    for (const auto& [name, value] : config) got += (got.empty() ? "" : ", ") + cut(name);
    return text("config got ", got, ", wanted the fields ", names.empty() ? "(none)" : names);
  }
  for (const Field& f : kind.fields) {
    const Value& v = config.at(std::string(f.name));
    if (!fits(f, v)) return text(f.name, " got ", shown(v), ", wanted ", wanted_of(f));
  }
  if (config.contains("in_channels")) {
    const int64_t groups = whole(config, "groups"), in = whole(config, "in_channels"),
                  out = whole(config, "out_channels");
    if (in % groups || out % groups) {
      return text("groups got ", groups, ", wanted a divisor of ", in, " and ", out, " channels");
    }
  }
  if (kind.name == "GroupNorm" && whole(config, "num_channels") % whole(config, "num_groups")) {
    return text("num_groups got ", whole(config, "num_groups"), ", wanted a divisor of ", whole(config, "num_channels"),
                " channels");
  }
  if (config.contains("num_layers") && whole(config, "num_layers") > kMaxLayers) {
    return text("num_layers got ", whole(config, "num_layers"), ", wanted at most ", kMaxLayers);
  }
  return "";
}

std::string wrong_tensors(const LayerKind& kind, const Layer& layer) {
  for (const Wanted& w : kind.tensors(layer.config)) {
    const Stored& t = layer.tensors.at(w.name);
    bool fits = t.shape.size() == w.shape.size();
    for (size_t d = 0; fits && d < w.shape.size(); ++d) fits = w.shape[d] < 0 || w.shape[d] == t.shape[d];
    if (!fits) return text(w.name, " got ", shown(t.shape), ", wanted ", shown(w.shape));
    const bool floating = t.element <= Element::kBf16;
    if (w.integer ? t.element != w.element : !floating) {
      return text(w.name, " got ", element_name(t.element), ", wanted ",
                  w.integer ? element_name(w.element) : "a floating dtype");
    }
  }
  return layer.tensors.contains("taps") ? wrong_tables(layer) : "";
}

}  // namespace structadmm::format
