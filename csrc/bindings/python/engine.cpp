// _core.Engine: a network over NumPy arrays, without torch. structadmm/engine.py is the class that users see.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "base/check.h"
#include "base/large_blocks.h"
#include "base/parallel.h"
#include "bindings/python/adapter.h"
#include "bindings/python/bind.h"
#include "runtime/load.h"

namespace structadmm::bindings {
namespace {

constexpr auto kOp = "Engine";

runtime::EngineOptions options_of(const std::string& dtype, const std::string& isa) {
  runtime::EngineOptions options;
  SADMM_CHECK(dtype == "float32" || dtype == "bfloat16", kOp, ": dtype got '", dtype, "', wanted float32 or bfloat16");
  options.dtype = dtype == "bfloat16" ? Dtype::kBf16 : Dtype::kF32;
  if (!isa.empty()) {
    options.isa = isa_from_name(isa);
    SADMM_CHECK(options.isa && isa_supported(*options.isa), kOp, ": isa got '", isa, "', wanted one of supported_isas");
  }
  return options;
}

class PyEngine {
 public:
  PyEngine(runtime::Loaded loaded) : loaded_(std::move(loaded)) {}

  static PyEngine open(const std::string& path, const std::string& dtype, const std::string& isa) {
    const auto options = options_of(dtype, isa);
    py::gil_scoped_release release;
    try {
      return runtime::load(format::read_file(path), path, options);
    } catch (const Error& e) {
      throw Error(std::string(kOp) + ": " + e.what());
    }
  }

  static PyEngine from_bytes(const py::buffer& bytes, const std::string& dtype, const std::string& isa) {
    const py::buffer_info info = bytes.request();
    SADMM_CHECK(info.ndim == 1 && info.itemsize == 1 && (info.shape[0] == 0 || info.strides[0] == 1), kOp,
                ": artefact got another buffer, wanted contiguous bytes");
    const auto options = options_of(dtype, isa);
    py::gil_scoped_release release;
    try {
      return runtime::load({static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size)}, "artefact",
                           options);
    } catch (const Error& e) {
      throw Error(std::string(kOp) + ": " + e.what());
    }
  }

  py::list run(const std::vector<py::array>& inputs) const {
    const std::vector<TensorView> in = views("input", inputs, false);
    const auto [arrays, out] = outputs(inputs, in);
    {
      py::gil_scoped_release release;
      loaded_.engine.run(in, out, ThreadPool::global());
    }
    return arrays;
  }

  std::vector<std::vector<int64_t>> output_sizes(const std::vector<std::vector<int64_t>>& inputs) const {
    return loaded_.engine.output_sizes(stand_ins(inputs));
  }

  std::vector<std::tuple<std::string, std::string, int64_t, int64_t>> describe(
      const std::vector<std::vector<int64_t>>& inputs) const {
    std::vector<std::tuple<std::string, std::string, int64_t, int64_t>> steps;
    py::gil_scoped_release release;
    for (const auto& s : loaded_.engine.describe(stand_ins(inputs)))
      steps.emplace_back(s.node, s.kernel, s.images, s.bytes);
    return steps;
  }

  std::vector<double> profile(const std::vector<py::array>& inputs, int repeats) const {
    const std::vector<TensorView> in = views("input", inputs, false);
    const auto [arrays, out] = outputs(inputs, in);
    py::gil_scoped_release release;
    return loaded_.engine.profile(in, out, repeats, ThreadPool::global());
  }

  int64_t arena_bytes(const std::vector<std::vector<int64_t>>& inputs) const {
    return loaded_.engine.arena_bytes(stand_ins(inputs));
  }

  py::object inputs() const {
    if (!loaded_.has_inputs) return py::none();
    py::list all;
    for (const format::Input& i : loaded_.inputs) {
      py::list shape;
      shape.append(py::none());
      for (const int64_t s : i.shape) shape.append(s);
      all.append(py::make_tuple(py::tuple(shape), format::element_name(i.element)));
    }
    return all;
  }

  const runtime::Loaded& loaded() const { return loaded_; }
  const char* dtype() const { return loaded_.engine.options().dtype == Dtype::kBf16 ? "bfloat16" : "float32"; }

 private:
  static std::vector<TensorView> views(const char* name, const std::vector<py::array>& arrays, bool written) {
    std::vector<TensorView> all;
    for (const py::array& a : arrays) all.push_back(view_of(kOp, name, a, written));
    return all;
  }

  // A large one gives its memory back to LargeBlocks, and can't be resized in place.
  static py::array output(const py::dtype& dtype, const std::vector<int64_t>& sizes) {
    int64_t bytes = dtype.itemsize();
    for (const int64_t n : sizes) bytes *= n;
    if (bytes < LargeBlocks::kLarge) return {dtype, sizes};
    auto block = std::make_unique<LargeBlocks::Block>(LargeBlocks::instance().take(bytes));
    if (!block->data) throw std::bad_alloc();
    void* const data = block->data;
    const py::capsule owner(block.release(), [](void* p) {
      const std::unique_ptr<LargeBlocks::Block> block(static_cast<LargeBlocks::Block*>(p));
      LargeBlocks::instance().give(*block);
    });
    return {dtype, sizes, data, owner};
  }

  // Contiguous arrays, of the dtype of the first input.
  std::pair<py::list, std::vector<TensorView>> outputs(const std::vector<py::array>& inputs,
                                                       const std::vector<TensorView>& in) const {
    const auto sizes = loaded_.engine.output_sizes(in);
    std::pair<py::list, std::vector<TensorView>> result;
    for (const auto& s : sizes) {
      py::array y = output(inputs.at(0).dtype(), s);
      result.second.push_back(view_of(kOp, "output", y, true));
      result.first.append(std::move(y));
    }
    return result;
  }

  // Contiguous f32 tensors without memory.
  static std::vector<TensorView> stand_ins(const std::vector<std::vector<int64_t>>& sizes) {
    std::vector<TensorView> all;
    for (const auto& s : sizes) {
      TensorView v;
      v.dtype = Dtype::kF32;
      SADMM_CHECK(s.size() <= kMaxDims, kOp, ": input got ", s.size(), " dimensions, wanted 2 or 4");
      v.dims = static_cast<int>(s.size());
      int64_t next = 1;
      for (size_t d = s.size(); d-- > 0;) {
        v.sizes[d] = s[d];
        v.strides[d] = next;
        SADMM_CHECK(s[d] >= 0 && s[d] < int64_t{1} << 31 && next < int64_t{1} << 31, kOp, ": input got size ", s[d],
                    ", wanted fewer than 2^31 values");
        next *= s[d];
      }
      all.push_back(v);
    }
    return all;
  }

  runtime::Loaded loaded_;
};

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<PyEngine>(m, "Engine", "A network that runs over NumPy arrays; thread-safe.")
      .def_static("open", &PyEngine::open, py::arg("path"), py::arg("dtype") = "float32", py::arg("isa") = "")
      .def_static("from_bytes", &PyEngine::from_bytes, py::arg("artefact"), py::arg("dtype") = "float32",
                  py::arg("isa") = "")
      .def("run", &PyEngine::run, py::arg("inputs"), "Arrays of the outputs, of the dtype of the first input.")
      .def("output_sizes", &PyEngine::output_sizes, py::arg("input_sizes"))
      .def("describe", &PyEngine::describe, py::arg("input_sizes"), "(node, kernel, images, bytes) of each step.")
      .def("profile", &PyEngine::profile, py::arg("inputs"), py::arg("repeats") = 10, "Seconds of each step.")
      .def("arena_bytes", &PyEngine::arena_bytes, py::arg("input_sizes"))
      .def_property_readonly("inputs", &PyEngine::inputs, "[(shape, dtype)], the batch None; None: not known.")
      .def_property_readonly("dtype", &PyEngine::dtype)
      .def_property_readonly("name", [](const PyEngine& e) { return e.loaded().name; })
      .def_property_readonly("digest", [](const PyEngine& e) { return e.loaded().digest; })
      .def_property_readonly(
          "metadata", [](const PyEngine& e) { return e.loaded().metadata; }, "JSON.")
      .def_property_readonly("n_inputs", [](const PyEngine& e) { return e.loaded().engine.graph().inputs.size(); })
      .def_property_readonly("n_outputs", [](const PyEngine& e) { return e.loaded().engine.graph().outputs.size(); });
}

}  // namespace structadmm::bindings
