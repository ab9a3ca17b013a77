// The allow-list: kinds of layers with their fields and tensors, functions and methods. Twin of
// python/structadmm/allowed.py; tests/test_format.py compares them.
#pragma once

#include <functional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "format/artefact.h"

namespace structadmm::format {

// A file's text for an error: short, and printable ASCII.
std::string cut(std::string_view text);

inline int64_t whole(const Config& c, const char* name) {
  return c.at(name).integer;
}

struct Field {
  enum class Type {
    kCount,    // integer of at least 1
    kNatural,  // of at least 0
    kDim,      // any integer
    kBool,
    kFloat,  // finite
    kProbability,
    kCountOrNull,
    kFloatOrNull,
    kSizes,     // `n` integers of at least 1
    kNaturals,  // of at least 0
    kPadding,   // kNaturals, "same" or "valid"
    kPaddingMode,
    kApproximate,  // of GELU
    kAdaptive,     // `n` sizes or nulls
    kShape,        // one to eight sizes
  };
  std::string_view name;
  Type type;
  int n = 0;
};

// A tensor that a configuration implies; -1 in a shape: the length is the data's own.
struct Wanted {
  std::string name;
  std::vector<int64_t> shape;
  bool integer = false;  // else floating
  Element element = Element::kF32;
};

struct LayerKind {
  std::string_view name;
  std::vector<Field> fields;
  std::vector<Wanted> (*tensors)(const Config&);
};

std::span<const LayerKind> layer_kinds();
const LayerKind* layer_kind(std::string_view name);
using NameSet = std::set<std::string, std::less<>>;
const NameSet& functions();
const NameSet& methods();
bool allowed_function(std::string_view name);
bool allowed_method(std::string_view name);

// In check_layer.cpp.

// What is wrong with a configuration, "what got ..., wanted ...", or an empty text.
std::string wrong_config(const LayerKind& kind, const Config& config);

// What is wrong with the tensors of a layer whose configuration is right.
std::string wrong_tensors(const LayerKind& kind, const Layer& layer);

}  // namespace structadmm::format
