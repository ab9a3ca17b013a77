#include "runtime/load.h"

#include "runtime/lower.h"

namespace structadmm::runtime {

Loaded load(std::span<const std::byte> bytes, const std::string& file, const EngineOptions& options) {
  format::Artefact artefact = format::read(bytes, file);
  return {.engine = Engine(lower(artefact), options),
          .name = std::move(artefact.name),
          .digest = std::move(artefact.digest),
          .metadata = std::move(artefact.metadata),
          .has_inputs = artefact.has_inputs,
          .inputs = std::move(artefact.inputs)};
}

}  // namespace structadmm::runtime
