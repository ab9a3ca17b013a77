#include "format/artefact.h"

#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/check.h"
#include "format/allowed.h"
#include "format/sha256.h"

static_assert(std::endian::native == std::endian::little, "artefacts are little-endian");

namespace structadmm::format {
namespace {

using nlohmann::json;
using VK = Value::Kind;

constexpr char kManifestKey[] = "structadmm", kDigestKey[] = "structadmm.sha256";
constexpr uint64_t kMaxHeader = 100'000'000;
// Values within values: more than any graph needs, few enough that recursion over them is harmless.
constexpr int kMaxDepth = 500;

struct ElementType {
  const char *stored, *name;
  int64_t size;
};
constexpr ElementType kElements[] = {
    {"F64", "float64", 8}, {"F32", "float32", 4}, {"F16", "float16", 2}, {"BF16", "bfloat16", 2}, {"I64", "int64", 8},
    {"I32", "int32", 4},   {"I16", "int16", 2},   {"I8", "int8", 1},     {"U8", "uint8", 1},      {"BOOL", "bool", 1}};

// What is wrong, "what got ..., wanted ..."; `read` adds the file's name.
template <class... Parts>
void need(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(parts...);
}

std::string shown(const json& j) {
  if (j.is_array()) return "a list of " + std::to_string(j.size());
  if (j.is_object()) {
    std::string keys;
    for (auto it = j.begin(); it != j.end() && keys.size() < 60; ++it) {
      keys += (keys.empty() ? "" : ", ") + it.key().substr(0, 30);
    }
    return "an object of (" + keys + ")";
  }
  return cut(j.dump(-1, ' ', true, json::error_handler_t::replace));
}

json parse(std::string_view text, const char* what) {
  std::vector<std::set<std::string>> names;  // of the objects that are open
  const auto event = [&](int depth, json::parse_event_t event, json& value) {
    need(depth <= kMaxDepth, what, " got values nested ", depth, " deep, wanted at most ", kMaxDepth);
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      need(names.back().insert(name).second, what, " got the name '", cut(name), "' twice, wanted it once");
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), event);
  } catch (const json::parse_error& e) {
    fail(what, " got a mistake at byte ", e.byte, ", wanted JSON");
  } catch (const json::exception& e) {
    fail(what, " got a number or text beyond all bounds (", e.id, "), wanted JSON");
  }
}

bool is_identifier(std::string_view s) {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  return !s.empty() && letter(s[0]) &&
         std::ranges::all_of(s, [&](char c) { return letter(c) || (c >= '0' && c <= '9'); });
}

bool is_path(std::string_view s) {
  bool empty = true;
  for (const char c : s) {
    const bool word =
        (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
    if (!word && (c != '.' || empty)) return false;
    empty = c == '.';
  }
  return !empty;
}

const std::string& identifier(const json& j, const char* what) {
  need(j.is_string() && is_identifier(j.get_ref<const std::string&>()), what, " got ", shown(j),
       ", wanted an identifier");
  return j.get_ref<const std::string&>();
}

void check_path(std::string_view path) {
  need(is_path(path), "path got '", cut(path), "', wanted names joined by dots");
}

// Arguments and configurations.

Element element_of(const json& j, const char* what) {
  if (j.is_string()) {
    for (size_t i = 0; i < std::size(kElements); ++i) {
      if (j.get_ref<const std::string&>() == kElements[i].name) return static_cast<Element>(i);
    }
  }
  fail(what, ": dtype got ", shown(j), ", wanted one of float32, float64, ...");
}

Value scalar(const json& j) {
  Value v;
  if (j.is_boolean()) {
    v.kind = VK::kBool;
    v.truth = j.get<bool>();
  } else if (j.is_string()) {
    v.kind = VK::kString;
    v.text = j.get<std::string>();
  } else if (j.is_number_integer()) {
    need(!j.is_number_unsigned() || j.get<uint64_t>() < uint64_t{1} << 63, "a number got ", shown(j),
         ", wanted less than 2^63");
    v.kind = VK::kInt;
    v.integer = j.get<int64_t>();
    need(v.integer != std::numeric_limits<int64_t>::min(), "a number got ", shown(j), ", wanted less than 2^63");
    v.number = static_cast<double>(v.integer);
  } else if (j.is_number_float()) {
    v.kind = VK::kFloat;
    v.number = j.get<double>();
    need(std::abs(v.number) < 0x1p63, "a number got ", shown(j), ", wanted less than 2^63");
  } else {
    need(j.is_null(), "an argument got ", shown(j), ", wanted a scalar");
  }
  return v;
}

// A field of a configuration: scalars, and lists of scalars.
Value field(const json& j) {
  if (!j.is_array()) {
    // Configurations hold larger floats than arguments may: they are judged field by field.
    if (j.is_number_float()) {
      Value v;
      v.kind = VK::kFloat;
      v.number = j.get<double>();
      return v;
    }
    return scalar(j);
  }
  Value v;
  v.kind = VK::kList;
  for (const json& item : j) v.items.push_back(scalar(item));
  return v;
}

using Known = std::map<std::string, int64_t>;  // node -> index, of those that came before

Value argument(const json& j, const Known& known);

std::vector<Value> arguments(const json& j, const Known& known) {
  std::vector<Value> out;
  out.reserve(j.size());
  for (const json& item : j) out.push_back(argument(item, known));
  return out;
}

Value argument(const json& j, const Known& known) {
  Value v;
  if (j.is_array()) {
    v.kind = VK::kList;
    v.items = arguments(j, known);
    return v;
  }
  if (!j.is_object()) return scalar(j);
  const bool single = j.size() == 1;
  const std::string tag = single ? j.begin().key() : "";
  const json& inner = single ? *j.begin() : j;
  if (tag == "node" && inner.is_string()) {
    const auto it = known.find(inner.get_ref<const std::string&>());
    need(it != known.end(), "reference got ", shown(inner), ", wanted the name of an earlier node");
    v.kind = VK::kNode;
    v.integer = it->second;
  } else if (tag == "tuple" && inner.is_array()) {
    v.kind = VK::kTuple;
    v.items = arguments(inner, known);
  } else if (tag == "slice" && inner.is_array() && inner.size() == 3) {
    v.kind = VK::kSlice;
    v.items = arguments(inner, known);
  } else if (tag == "dict" && inner.is_array() && std::ranges::all_of(inner, [](const json& p) {
               return p.is_array() && p.size() == 2 && p[0].is_string();
             })) {
    v.kind = VK::kDict;
    for (const json& pair : inner) {
      v.keys.push_back(pair[0].get<std::string>());
      v.items.push_back(argument(pair[1], known));
    }
  } else if (tag == "float" && (inner == "inf" || inner == "-inf" || inner == "nan")) {
    v.kind = VK::kFloat;
    v.number = inner == "nan"   ? std::numeric_limits<double>::quiet_NaN()
               : inner == "inf" ? std::numeric_limits<double>::infinity()
                                : -std::numeric_limits<double>::infinity();
  } else if (tag == "dtype") {
    v.kind = VK::kDtype;
    v.text = element_name(element_of(inner, "an argument"));
  } else if (tag == "ellipsis" && inner == true) {
    v.kind = VK::kEllipsis;
  } else {
    fail("an argument got ", shown(j),
         ", wanted a scalar, a list, or an object with one of the keys node, tuple, slice, "
         "dict, float, dtype, ellipsis");
  }
  return v;
}

// Structures: layers, attributes, graph, of the network or of its original.

struct TensorRow {
  std::vector<int64_t> shape;
  Element element;
};

TensorRow tensor_row(const json& shape, const json& dtype, const char* what) {
  bool fits = shape.is_array() && shape.size() < 9;
  TensorRow row;
  for (size_t d = 0; fits && d < shape.size(); ++d) {
    fits = shape[d].is_number_unsigned() && shape[d].get<uint64_t>() < uint64_t{1} << 31;
    if (fits) row.shape.push_back(shape[d].get<int64_t>());
  }
  need(fits, what, ": shape got ", shown(shape), ", wanted sizes");
  row.element = element_of(dtype, what);
  return row;
}

bool has_fields(const json& j, std::initializer_list<const char*> names) {
  return j.is_object() && j.size() == names.size() &&
         std::ranges::all_of(names, [&](const char* n) { return j.contains(n); });
}

struct Structure {
  std::map<std::string, Layer> layers;  // without tensors
  std::map<std::string, TensorRow> attributes;
  std::vector<Call> graph;
  int64_t n_inputs = 0;
};

Layer layer_of(const json& row) {
  need(has_fields(row, {"kind", "config"}), "layer got ", shown(row), ", wanted kind and config");
  const json& kind = row["kind"];
  const LayerKind* known = kind.is_string() ? layer_kind(kind.get_ref<const std::string&>()) : nullptr;
  need(known, "layer got ", shown(kind), ", wanted one in the allow-list");
  need(row["config"].is_object(), "config got ", shown(row["config"]), ", wanted an object");
  Layer layer{.kind = kind.get<std::string>(), .config = {}, .tensors = {}};
  for (const auto& [name, value] : row["config"].items()) {
    need(!value.is_object(), cut(name), " got an object, wanted a scalar or a list");
    layer.config.emplace(name, field(value));
  }
  const std::string wrong = wrong_config(*known, layer.config);
  need(wrong.empty(), wrong);
  return layer;
}

bool is_node(const json& args, size_t i) {
  return args.size() > i && args[i].is_object() && args[i].contains("node");
}

Call call_of(const json& row, const Structure& s, const Known& known) {
  need(row.is_object(), "node got ", shown(row), ", wanted an object");
  for (const auto& [key, value] : row.items()) {
    need(key == "name" || key == "op" || key == "target" || key == "args" || key == "kwargs", "fields got '", cut(key),
         "', wanted name, op, target, args, kwargs");
  }
  const json null, no_args = json::array(), no_kwargs = json::object();
  const auto get = [&](const char* key, const json& other) -> const json& {
    const auto it = row.find(key);
    return it == row.end() ? other : *it;
  };
  const json &op = get("op", null), &target = get("target", null), &args = get("args", no_args),
             &kwargs = get("kwargs", no_kwargs);
  Call call;
  call.name = identifier(get("name", null), "name");
  need(!known.contains(call.name), "name got '", call.name, "', wanted another name than an earlier node's");
  constexpr const char* kOps[] = {"placeholder", "get_attr", "call_module", "call_function", "call_method", "output"};
  const auto found = std::ranges::find_if(kOps, [&](const char* o) { return op == o; });
  need(found != std::end(kOps), "op got ", shown(op),
       ", wanted one of placeholder, get_attr, call_module, call_function, "
       "call_method, output");
  call.op = static_cast<Op>(found - kOps);
  need(args.is_array(), "args got ", shown(args), ", wanted a list");
  need(kwargs.is_object(), "kwargs got ", shown(kwargs), ", wanted an object");
  for (const auto& [key, value] : kwargs.items()) {
    need(is_identifier(key), "kwargs got '", cut(key), "', wanted identifiers as keys");
  }
  need(call.op == Op::kOutput ? target.is_null() : target.is_string(), "target got ", shown(target), ", wanted ",
       call.op == Op::kOutput ? "none" : "a name");
  if (target.is_string()) call.target = target.get<std::string>();
  switch (call.op) {
    case Op::kPlaceholder:
      identifier(target, "target");
      need(args.size() <= 1 && kwargs.empty() && (args.empty() || args[0].is_primitive()), "args got ", shown(args),
           ", wanted at most a default value");
      break;
    case Op::kOutput:
      need(args.size() == 1 && kwargs.empty(), "args got ", shown(args), ", wanted what the network returns");
      break;
    case Op::kGetAttr: {
      need(args.empty() && kwargs.empty(), "args got ", shown(args), ", wanted none");
      check_path(call.target);
      const size_t dot = call.target.rfind('.');
      const auto owner = dot == std::string::npos ? s.layers.end() : s.layers.find(call.target.substr(0, dot));
      bool held = s.attributes.contains(call.target);
      if (owner != s.layers.end()) {
        for (const Wanted& w : layer_kind(owner->second.kind)->tensors(owner->second.config)) {
          held = held || w.name == call.target.substr(dot + 1);
        }
      }
      need(held, "target got '", call.target, "', wanted a tensor of the file");
      break;
    }
    case Op::kCallModule:
      check_path(call.target);
      need(s.layers.contains(call.target), "target got '", call.target, "', wanted a layer of the file");
      break;
    case Op::kCallFunction:
      need(allowed_function(call.target), "function got '", cut(call.target), "', wanted one in the allow-list");
      if (call.target == "getattr") {
        const bool known = args.size() == 2 && (args[1] == "shape" || args[1] == "dtype" || args[1] == "device");
        need(known && args[0].is_object() && kwargs.empty(), "getattr got ", shown(args),
             ", wanted a node and one of shape, dtype, device");
      }
      if (call.target.starts_with("operator.i")) {
        need(!args.empty() && args[0].is_object(), "args got ", shown(args), ", wanted a node first");
      }
      break;
    case Op::kCallMethod:
      need(allowed_method(call.target), "method got '", cut(call.target), "', wanted one in the allow-list");
      need(is_node(args, 0), "args got ", shown(args), ", wanted a node first");
      break;
  }
  call.args = arguments(args, known);
  for (const auto& [key, value] : kwargs.items()) call.kwargs.emplace(key, argument(value, known));
  return call;
}

const json& member(const json& j, const char* name, json::value_t type, const char* wanted) {
  const auto it = j.find(name);
  need(it != j.end() && it->type() == type, name, " got ", it == j.end() ? "none" : shown(*it), ", wanted ", wanted);
  return *it;
}

template <class Work>
auto within(const std::string& place, const Work& work) {
  try {
    return work();
  } catch (const Error& e) {
    throw Error(place + ": " + e.what());
  }
}

// A path in use may not lie inside another one.
void check_owners(const Structure& s) {
  const auto used = [&](const std::string& p) { return s.layers.contains(p) || s.attributes.contains(p); };
  const auto check = [&](const std::string& path) {
    check_path(path);
    for (size_t dot = path.find('.'); dot != std::string::npos; dot = path.find('.', dot + 1)) {
      need(!used(path.substr(0, dot)), "path got '", cut(path), "', wanted one that passes through no layer");
    }
  };
  for (const auto& [path, layer] : s.layers) check(path);
  for (const auto& [path, row] : s.attributes) {
    check(path);
    need(!s.layers.contains(path), "path got '", cut(path), "', wanted one that is not in use");
  }
}

Structure structure_of(const json& spec) {
  Structure s;
  const auto name = spec.find("name");
  identifier(name == spec.end() ? json() : *name, "name");
  for (const auto& [path, row] : member(spec, "modules", json::value_t::object, "an object").items()) {
    s.layers.emplace(path, within("layer " + cut(path), [&] { return layer_of(row); }));
  }
  for (const auto& [path, row] : member(spec, "attributes", json::value_t::object, "an object").items()) {
    within("attribute " + cut(path), [&] {
      need(has_fields(row, {"shape", "dtype"}), "a tensor got ", shown(row), ", wanted shape and dtype");
      s.attributes.emplace(path, tensor_row(row["shape"], row["dtype"], "a tensor"));
    });
  }
  check_owners(s);
  Known known;
  std::set<std::string> called;
  for (const json& row : member(spec, "graph", json::value_t::array, "a list")) {
    const std::string place = row.is_object() && row.contains("name") ? shown(row["name"]) : shown(row);
    within("node " + place, [&] {
      Call call = call_of(row, s, known);
      need(s.graph.empty() || s.graph.back().op != Op::kOutput,
           "graph got more after the output, wanted one, at the end");
      if (call.op == Op::kPlaceholder) {
        need(s.n_inputs == static_cast<int64_t>(s.graph.size()),
             "graph got a placeholder late, wanted placeholders first");
        ++s.n_inputs;
      }
      if (call.op == Op::kCallModule) called.insert(call.target);
      known.emplace(call.name, static_cast<int64_t>(s.graph.size()));
      s.graph.push_back(std::move(call));
    });
  }
  need(!s.graph.empty() && s.graph.back().op == Op::kOutput, "graph got no output, wanted one, at the end");
  for (const auto& [path, layer] : s.layers) {
    need(called.contains(path), "layers got '", cut(path), "', wanted only layers that the graph calls");
  }
  return s;
}

// The container.

struct Container {
  json header, manifest;
  std::string digest;
  std::span<const std::byte> data;  // behind the header
};

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string marker(const std::string& digest) {
  return '"' + std::string(kDigestKey) + "\":\"" + digest + '"';
}

// The length of the header, or nothing where there is none whole.
bool header_size(std::span<const std::byte> bytes, uint64_t& size) {
  if (bytes.size() < 8) return false;
  std::memcpy(&size, bytes.data(), 8);
  return size <= std::min<uint64_t>(kMaxHeader, bytes.size() - 8);
}

void check_digest(std::span<const std::byte> bytes, std::string_view head, const std::string& digest) {
  const std::string mark = marker(digest);
  const size_t at = head.find(mark);
  need(digest.size() == 64 && at != head.npos && head.find(mark, at + 1) == head.npos, "digest got '", cut(digest),
       "', wanted one SHA-256 in hexadecimal");
  const size_t begin = 8 + at + mark.size() - 65;
  Sha256 sha;
  const std::string zeros(64, '0');
  sha.add(bytes.first(begin));
  sha.add(std::as_bytes(std::span(zeros)));
  sha.add(bytes.subspan(begin + 64));
  const std::string actual = sha.hex();
  need(digest == actual, "SHA-256 got ", actual, ", wanted ", digest, ": the file is damaged or was changed");
}

Container open(std::span<const std::byte> bytes) {
  need(bytes.size() >= 8, "file got ", bytes.size(), " bytes, wanted a safetensors file");
  uint64_t size = 0;
  if (!header_size(bytes, size)) {
    const std::string_view start = as_text(bytes.first(4));
    need(start != std::string_view("PK\x03\x04", 4) && !start.starts_with("\x80\x02") && !start.starts_with("\x80\x04"),
         "file got a pickle, or a PyTorch checkpoint, wanted an artefact: structadmm compact makes one");
    fail("file got a header of ", size, " bytes in ", bytes.size(), ", wanted a whole safetensors file");
  }
  const std::string_view head = as_text(bytes.subspan(8, size));
  Container c{parse(head, "header"), {}, {}, bytes.subspan(8 + size)};
  need(c.header.is_object(), "header got ", shown(c.header), ", wanted an object");
  const json about = c.header.value("__metadata__", json());
  c.header.erase("__metadata__");
  const auto manifest = about.is_object() ? about.find(kManifestKey) : about.end();
  need(about.is_object() && manifest != about.end() && manifest->is_string(),
       "file got safetensors without a structadmm manifest, wanted an artefact: structadmm compact makes one");
  c.manifest = parse(manifest->get_ref<const std::string&>(), "manifest");
  need(c.manifest.is_object(), "manifest got ", shown(c.manifest), ", wanted an object");
  const auto version = c.manifest.find("version");
  need(version != c.manifest.end() && version->is_number_integer() && *version == 0, "version got ",
       version == c.manifest.end() ? "none" : shown(*version), ", wanted 0");
  const auto digest = about.find(kDigestKey);
  need(digest != about.end() && digest->is_string(), "digest got none, wanted one SHA-256 in hexadecimal");
  c.digest = digest->get<std::string>();
  check_digest(bytes, head, c.digest);
  return c;
}

std::map<std::string, Stored> stored_tensors(const Container& c) {
  std::map<std::string, Stored> tensors;
  std::vector<std::array<uint64_t, 2>> places;
  for (const auto& [name, row] : c.header.items()) {
    within("tensor " + cut(name), [&] {
      need(has_fields(row, {"dtype", "shape", "data_offsets"}), "header got ", shown(row),
           ", wanted dtype, shape, data_offsets");
      Stored t;
      const auto found =
          std::ranges::find_if(kElements, [&](const ElementType& e) { return row["dtype"] == e.stored; });
      need(found != std::end(kElements), "dtype got ", shown(row["dtype"]), ", wanted one of F32, F16, BF16, ...");
      t.element = static_cast<Element>(found - kElements);
      need(row["shape"].is_array() && row["shape"].size() <= 64, "shape got ", shown(row["shape"]), ", wanted sizes");
      uint64_t n = static_cast<uint64_t>(found->size);
      for (const json& s : row["shape"]) {
        need(s.is_number_unsigned() && s.get<uint64_t>() < uint64_t{1} << 62, "shape got ", shown(s), ", wanted sizes");
        const auto extent = s.get<uint64_t>();
        need(extent == 0 || n <= (uint64_t{1} << 62) / extent, "shape got an overflow, wanted fewer than 2^62 bytes");
        n *= extent;
        t.shape.push_back(static_cast<int64_t>(extent));
      }
      const json& at = row["data_offsets"];
      need(at.is_array() && at.size() == 2 && at[0].is_number_unsigned() && at[1].is_number_unsigned(),
           "data_offsets got ", shown(at), ", wanted two offsets");
      const auto begin = at[0].get<uint64_t>(), end = at[1].get<uint64_t>();
      need(begin <= end && end <= c.data.size() && end - begin == n, "data_offsets got ", begin, " to ", end,
           ", wanted ", n, " bytes within ", c.data.size());
      t.bytes = c.data.subspan(begin, n);
      places.push_back({begin, end});
      tensors.emplace(name, std::move(t));
    });
  }
  std::ranges::sort(places);
  uint64_t next = 0;
  for (const auto& [begin, end] : places) {
    need(begin == next, "tensors got data from ", begin, ", wanted it from ", next, ": no gaps, nothing twice");
    next = end;
  }
  need(next == c.data.size(), "tensors got ", next, " bytes, wanted the file's ", c.data.size());
  return tensors;
}

// A hint among the user's own values: what does not look like one is none.
std::map<std::string, std::string> families_of(const json& metadata) {
  std::map<std::string, std::string> families;
  const json optimize = metadata.value("optimize", json());
  const json rows = optimize.is_object() ? optimize.value("families", json()) : json();
  if (!rows.is_object()) return families;
  for (const auto& [path, family] : rows.items()) {
    if (family == "taps" || family == "winograd" || family == "nonzeros") {
      families.emplace(path, family.get<std::string>());
    }
  }
  return families;
}

template <class Map>
void check_names(const json& manifest, const char* key, const Map& known) {
  for (const json& name : member(manifest, key, json::value_t::array, "a list of names")) {
    need(name.is_string() && known.contains(name.get_ref<const std::string&>()), key, " got ", shown(name),
         ", wanted names of the file's tensors");
  }
}

std::vector<Input> inputs_of(const json& rows, int64_t most) {
  need(rows.is_array() && static_cast<int64_t>(rows.size()) <= most, "inputs got ", shown(rows), ", wanted at most ",
       most, " inputs");
  std::vector<Input> inputs;
  for (const json& row : rows) {
    need(has_fields(row, {"shape", "dtype"}) && row["shape"].is_array() && !row["shape"].empty() &&
             row["shape"][0].is_null(),
         "input got ", shown(row), ", wanted a shape that begins with null, the batch, and a dtype");
    json shape = row["shape"];
    shape.erase(shape.begin());
    TensorRow checked = tensor_row(shape, row["dtype"], "input");
    inputs.push_back({std::move(checked.shape), checked.element});
  }
  return inputs;
}

Artefact restore(const Container& c, const std::string& file) {
  constexpr const char* kFields[] = {"version",       "producer", "name",     "modules", "attributes",
                                     "graph",         "dtype",    "ties",     "frozen",  "buffers",
                                     "channels_last", "inputs",   "original", "metadata"};
  const json& m = c.manifest;
  bool same = m.size() == std::size(kFields);
  for (const char* name : kFields) same = same && m.contains(name);
  need(same, "manifest got ", shown(m),
       ", wanted the fields version, producer, name, modules, attributes, graph, dtype, "
       "ties, frozen, buffers, channels_last, inputs, original, metadata");
  member(m, "producer", json::value_t::string, "a string");
  Artefact a;
  a.file = file;
  a.digest = c.digest;
  a.metadata = member(m, "metadata", json::value_t::object, "an object").dump();
  a.families = families_of(m["metadata"]);
  if (!m["dtype"].is_null()) element_of(m["dtype"], "manifest");
  Structure s = structure_of(m);
  a.name = m["name"].get<std::string>();
  if (!m["inputs"].is_null()) {
    a.has_inputs = true;
    a.inputs = inputs_of(m["inputs"], s.n_inputs);
  }
  if (!m["original"].is_null()) {
    need(m["original"].is_object(), "original got ", shown(m["original"]), ", wanted null or an object");
    within("original", [&] { structure_of(m["original"]); });
  }

  std::map<std::string, Stored> stored = stored_tensors(c), all = stored;
  for (const auto& [name, to] : member(m, "ties", json::value_t::object, "an object").items()) {
    need(to.is_string() && stored.contains(to.get_ref<const std::string&>()) && !stored.contains(name), "tie of ",
         cut(name), " got ", shown(to), ", wanted the name of a stored tensor");
    all.emplace(name, stored.at(to.get_ref<const std::string&>()));
  }
  size_t used = 0;
  const auto take = [&](const std::string& name) -> const Stored& {
    const auto it = all.find(name);
    need(it != all.end(), "tensors got none named ", cut(name), ", wanted all that the layers need");
    ++used;
    return it->second;
  };
  for (auto& [path, layer] : s.layers) {
    within("layer " + path, [&] {
      const LayerKind& kind = *layer_kind(layer.kind);
      for (const Wanted& w : kind.tensors(layer.config)) layer.tensors.emplace(w.name, take(path + "." + w.name));
      const std::string wrong = wrong_tensors(kind, layer);
      need(wrong.empty(), wrong);
    });
  }
  for (const auto& [path, row] : s.attributes) {
    const Stored& t = take(path);
    need(t.shape == row.shape && t.element == row.element, path,
         " got another shape or dtype, wanted those of attributes");
    a.attributes.emplace(path, t);
  }
  need(used == all.size(), "tensors got ", all.size(), ", wanted only the ", used, " that the layers need");
  check_names(m, "frozen", stored);
  check_names(m, "buffers", s.attributes);
  check_names(m, "channels_last", stored);
  for (const json& name : m["channels_last"]) {
    const size_t dims = stored.at(name.get_ref<const std::string&>()).shape.size();
    need(dims == 4, "channels_last ", shown(name), " got ", dims, " dimensions, wanted 4");
  }
  a.layers = std::move(s.layers);
  a.graph = std::move(s.graph);
  return a;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const int exponent = h >> 10 & 31;
  const uint32_t mantissa = h & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  const float value = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                               : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -value : value;
}

template <class T, class Convert>
std::vector<float> converted(std::span<const std::byte> bytes, const Convert& convert) {
  std::vector<float> out(bytes.size() / sizeof(T));
  for (size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    out[i] = convert(value);
  }
  return out;
}

}  // namespace

const char* element_name(Element element) {
  return kElements[static_cast<int>(element)].name;
}

int64_t element_size(Element element) {
  return kElements[static_cast<int>(element)].size;
}

std::vector<float> as_floats(const Stored& t) {
  switch (t.element) {
    case Element::kF32:
      return converted<float>(t.bytes, [](float v) { return v; });
    case Element::kF64:
      return converted<double>(t.bytes, [](double v) { return static_cast<float>(v); });
    case Element::kF16:
      return converted<uint16_t>(t.bytes, half_to_float);
    case Element::kBf16:
      return converted<uint16_t>(t.bytes,
                                 [](uint16_t v) { return std::bit_cast<float>(static_cast<uint32_t>(v) << 16); });
    case Element::kI64:
      return converted<int64_t>(t.bytes, [](int64_t v) { return static_cast<float>(v); });
    case Element::kI32:
      return converted<int32_t>(t.bytes, [](int32_t v) { return static_cast<float>(v); });
    case Element::kI16:
      return converted<int16_t>(t.bytes, [](int16_t v) { return static_cast<float>(v); });
    case Element::kI8:
      return converted<int8_t>(t.bytes, [](int8_t v) { return static_cast<float>(v); });
    default:
      return converted<uint8_t>(t.bytes, [](uint8_t v) { return static_cast<float>(v); });
  }
}

std::vector<int32_t> as_int32(const Stored& t) {
  std::vector<int32_t> out(t.bytes.size() / 4);
  if (!out.empty()) std::memcpy(out.data(), t.bytes.data(), out.size() * 4);
  return out;
}

Artefact read(std::span<const std::byte> data, const std::string& file) {
  return within(file, [&] { return restore(open(data), file); });
}

std::vector<std::byte> read_file(const std::string& path) {
  // Not std::filesystem, some of whose symbols no version of libstdc++ promises.
  struct stat about = {};
  SADMM_CHECK(stat(path.c_str(), &about) == 0, path, ": file got none, wanted an artefact");
  SADMM_CHECK(!S_ISDIR(about.st_mode), path, ": path got a folder, wanted a file");
  SADMM_CHECK(S_ISREG(about.st_mode), path, ": path got a device or a pipe, wanted a file");
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  const auto size = in ? static_cast<std::streamoff>(in.tellg()) : -1;
  SADMM_CHECK(size >= 0, path, ": file got no permission, wanted one that can be read");
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  in.seekg(0);
  if (size > 0) in.read(reinterpret_cast<char*>(bytes.data()), size);
  SADMM_CHECK(in.gcount() == size, path, ": file got ", in.gcount(), " bytes, wanted ", size);
  return bytes;
}

std::string claimed_digest(std::span<const std::byte> data) {
  uint64_t size = 0;
  if (!header_size(data, size)) return "";
  const std::string_view head = as_text(data.subspan(8, size));
  const std::string mark = marker("").substr(0, std::size(kDigestKey) + 3);
  const size_t at = head.find(mark);
  return at == head.npos || head.size() - at < mark.size() + 64 ? "" : std::string(head.substr(at + mark.size(), 64));
}

}  // namespace structadmm::format
