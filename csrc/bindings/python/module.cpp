// structadmm._core: the ops over NumPy arrays, importable without torch.
#include "bindings/python/bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The kernels of structadmm over NumPy arrays, without torch.";
  structadmm::bindings::bind_common(m);
  structadmm::bindings::bind_compact(m);
  structadmm::bindings::bind_engine(m);
  structadmm::bindings::bind_graph(m);
  structadmm::bindings::bind_conv_step(m);
  structadmm::bindings::bind_projection(m);
  structadmm::bindings::bind_steps(m);
}
