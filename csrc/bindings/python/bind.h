// One function per family of ops, each in its own file, called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace structadmm::bindings {

void bind_common(pybind11::module_& m);
void bind_compact(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_graph(pybind11::module_& m);
void bind_conv_step(pybind11::module_& m);
void bind_projection(pybind11::module_& m);
void bind_steps(pybind11::module_& m);

}  // namespace structadmm::bindings
