// _core: version, isa, threads.
#include <string>

#include "base/isa.h"
#include "base/parallel.h"
#include "bindings/python/bind.h"

namespace structadmm::bindings {

void bind_common(pybind11::module_& m) {
  m.attr("__version__") = SADMM_VERSION;
  m.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Force an instruction set; '' returns to the default.");
  m.def(
      "supported_isas",
      [] {
        pybind11::list names;
        for (Isa isa : kAllIsas) {
          if (isa_supported(isa)) names.append(isa_name(isa));
        }
        return names;
      },
      "The instruction sets that were compiled in and that this CPU has.");
  m.def("get_num_threads", [] { return ThreadPool::global().threads(); });
  m.def("set_num_threads", &ThreadPool::set_threads, pybind11::arg("threads"));
}

}  // namespace structadmm::bindings
