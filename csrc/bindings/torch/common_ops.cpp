// The op library itself and the ops about it: version, isa, set_isa. Each family of ops has a file beside this one,
// with schemas (a FRAGMENT) and implementations together.
#include <string>

#include "base/isa.h"
#include "bindings/torch/adapter.h"

namespace {

std::string version() {
  return SADMM_VERSION;
}

std::string isa() {
  return structadmm::isa_name(structadmm::current_isa());
}

void set_isa(std::string name) {
  structadmm::set_isa(name);
}

}  // namespace

STABLE_TORCH_LIBRARY(structadmm, m) {
  m.def("version() -> str");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}

// No tensor argument says which device: these are the same everywhere.
STABLE_TORCH_LIBRARY_IMPL(structadmm, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&version));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}
