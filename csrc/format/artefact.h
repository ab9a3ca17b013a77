// An artefact (FORMAT.md), read and checked: layers with their configurations and tensors, and the graph that calls
// them.
//
// Every check that FORMAT.md lists has passed once `read` returns. Nothing here knows what a layer computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace structadmm::format {

// The types of stored tensors.
enum class Element { kF64, kF32, kF16, kBf16, kI64, kI32, kI16, kI8, kU8, kBool };
const char* element_name(Element element);  // as the manifest writes it: "float32"
int64_t element_size(Element element);

// A tensor inside the file's bytes, row-major, at any alignment.
struct Stored {
  Element element = Element::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;

  int64_t numel() const { return static_cast<int64_t>(bytes.size()) / element_size(element); }
};

std::vector<float> as_floats(const Stored& tensor);   // rounded to f32
std::vector<int32_t> as_int32(const Stored& tensor);  // of kI32 alone

// An argument of a node, or a field of a configuration (there: null, bool, int, float, string, lists).
struct Value {
  enum class Kind { kNull, kBool, kInt, kFloat, kString, kNode, kList, kTuple, kSlice, kDict, kDtype, kEllipsis };
  Kind kind = Kind::kNull;
  bool truth = false;
  int64_t integer = 0;            // of kInt; of kNode: its index in the graph
  double number = 0;              // of kFloat, and of kInt
  std::string text;               // of kString, kDtype
  std::vector<Value> items;       // of kList, kTuple, kSlice (start, stop, step), kDict (values)
  std::vector<std::string> keys;  // of kDict

  bool is(Kind k) const { return kind == k; }
  bool is_null() const { return kind == Kind::kNull; }
  bool is_number() const { return kind == Kind::kInt || kind == Kind::kFloat; }
  bool is_sequence() const { return kind == Kind::kList || kind == Kind::kTuple; }
};

using Config = std::map<std::string, Value>;

struct Layer {
  std::string kind;
  Config config;
  std::map<std::string, Stored> tensors;
};

enum class Op { kPlaceholder, kGetAttr, kCallModule, kCallFunction, kCallMethod, kOutput };

struct Call {
  std::string name;
  Op op = Op::kPlaceholder;
  std::string target;
  std::vector<Value> args;
  std::map<std::string, Value> kwargs;
};

struct Input {
  std::vector<int64_t> shape;  // without the batch
  Element element = Element::kF32;
};

struct Artefact {
  std::string file;    // how errors call it
  std::string digest;  // 64 hexadecimal digits
  std::string name;
  std::map<std::string, Layer> layers;
  std::map<std::string, Stored> attributes;
  std::vector<Call> graph;
  bool has_inputs = false;
  std::vector<Input> inputs;  // of the first placeholders
  std::string metadata;       // the user's object, JSON
  // Layer -> family of kernels ("taps", "winograd", "nonzeros") that `optimize` measured to be the fastest:
  // metadata.optimize.families.
  std::map<std::string, std::string> families;
};

// An artefact in memory. Its tensors are views: `data` must outlive them. Throws Error, which calls the data `file`.
Artefact read(std::span<const std::byte> data, const std::string& file);

// The bytes of a file, all of them. Throws Error.
std::vector<std::byte> read_file(const std::string& path);

// The digest that the header of an artefact claims, unchecked; empty where there is none.
std::string claimed_digest(std::span<const std::byte> data);

}  // namespace structadmm::format
