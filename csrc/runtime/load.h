// An artefact's bytes as an engine, with what the file says about itself.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "format/artefact.h"
#include "runtime/engine.h"

namespace structadmm::runtime {

struct Loaded {
  Engine engine;
  std::string name, digest, metadata;  // metadata: JSON
  bool has_inputs = false;             // whether the file says what goes in
  std::vector<format::Input> inputs;
};

// The bytes are not needed afterwards. Throws Error, which calls them `file`.
Loaded load(std::span<const std::byte> bytes, const std::string& file, const EngineOptions& options);

}  // namespace structadmm::runtime
