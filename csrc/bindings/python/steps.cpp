// _core.StepDoor: single steps of a segment over NumPy arrays, for tests. It lays planes out, fills what a step may not
// read as a number with NaN, runs the step, and throws if anything but the inside of the output was written.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "bindings/python/adapter.h"
#include "bindings/python/bind.h"
#include "ops/conv.h"
#include "ops/steps.h"
#include "simd/vec_scalar.h"

namespace structadmm::bindings {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using MaybeFloats = std::optional<Floats>;
using Sides = std::optional<std::array<int64_t, 4>>;  // top, left, bottom, right; none: a contiguous tensor
using Pair = std::array<int64_t, 2>;
using Ints = std::vector<int32_t>;

constexpr int64_t kGuard = 64;  // elements before and behind

Planes planes_of(Dtype dtype, int64_t images, int64_t c, int64_t h, int64_t w, const Sides& halo) {
  if (!halo) return tensor_planes(dtype, images, c, h, w);
  return arena_planes(dtype, images, c, h, w, {(*halo)[0], (*halo)[1], (*halo)[2], (*halo)[3]});
}

struct Memory {
  Planes planes;
  int64_t images;
  std::vector<uint32_t> f32;
  std::vector<uint16_t> bf16;

  // All zeros but the guards, and the slack, which are NaN.
  Memory(const Planes& p, int64_t n, bool slack) : planes(p), images(n) {
    const auto size = static_cast<size_t>(p.readable + 2 * kGuard);
    const auto nan_from = static_cast<size_t>(kGuard + p.readable - (slack ? kSlack : 0));
    if (p.dtype == Dtype::kF32) {
      f32.assign(size, 0);
      for (size_t i = 0; i < size; ++i) f32[i] = i < kGuard || i >= nan_from ? 0x7fc12345 : 0;
    } else {
      bf16.assign(size, 0);
      for (size_t i = 0; i < size; ++i) bf16[i] = i < kGuard || i >= nan_from ? 0x7fc1 : 0;
    }
  }

  void* data() { return f32.empty() ? static_cast<void*>(bf16.data() + kGuard) : f32.data() + kGuard; }

  template <class Visit>
  void each(const Visit& visit) const {
    size_t i = 0;
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t c = 0; c < planes.channels; ++c) {
        for (int64_t y = 0; y < planes.height; ++y) {
          for (int64_t x = 0; x < planes.width; ++x) visit(static_cast<size_t>(kGuard + planes.at(n, c, y, x)), i++);
        }
      }
    }
  }

  void fill(const float* values) {
    each([&](size_t at, size_t i) {
      if (f32.empty()) {
        Bf16 h;
        scalar::from_float(values[i], h);
        bf16[at] = h.bits;
      } else {
        std::memcpy(&f32[at], &values[i], 4);
      }
    });
  }
  void mark() {
    each([&](size_t at, size_t) { f32.empty() ? bf16[at] = 0x7fc2 : f32[at] = 0x7fc54321; });
  }
  py::array_t<float> values() const {
    py::array_t<float> out({images, planes.channels, planes.height, planes.width});
    float* to = out.mutable_data();
    each([&](size_t at, size_t i) {
      if (f32.empty()) {
        to[i] = scalar::to_float(Bf16{bf16[at]});
      } else {
        std::memcpy(&to[i], &f32[at], 4);
      }
    });
    return out;
  }
};

Dtype dtype_from(const std::string& name) {
  if (name == "f32") return Dtype::kF32;
  SADMM_CHECK(name == "bf16", "StepDoor: dtype got '", name, "', wanted f32 or bf16");
  return Dtype::kBf16;
}

Epilogue epilogue_from(const py::dict& d) {
  constexpr const char* names[] = {"clamp",       "silu",    "gelu", "gelu_tanh", "hardswish",
                                   "hardsigmoid", "sigmoid", "tanh", "leaky_relu"};
  Epilogue e;
  for (const auto& [key, value] : d) {
    const auto k = key.cast<std::string>();
    if (k == "low") e.low = value.cast<float>();
    if (k == "high") e.high = value.cast<float>();
    if (k == "slope") e.slope = value.cast<float>();
    if (k != "activation") continue;
    const auto* found = std::find(std::begin(names), std::end(names), value.cast<std::string>());
    SADMM_CHECK(found != std::end(names), "StepDoor: activation got an unknown one");
    e.activation = static_cast<Activation>(found - names);
  }
  return e;
}

TensorView tensor_of(const char* name, const py::array& a, bool written) {
  if (a.dtype().kind() != 'u' || a.itemsize() != 2) return view_of("StepDoor", name, a, written);
  TensorView v;  // the bits of bf16
  v.data = const_cast<void*>(a.data());
  v.dtype = Dtype::kBf16;
  v.dims = static_cast<int>(a.ndim());
  for (int d = 0; d < v.dims; ++d) v.sizes[d] = a.shape(d), v.strides[d] = a.strides(d) / 2;
  return v;
}

class Door {
 public:
  Door(const std::string& isa, const std::string& dtype, const std::string& y_dtype, const Sides& x_halo,
       const Sides& y_halo, const Sides& b_halo, int threads, int64_t spare_images)
      : dtype_(dtype_from(dtype)),
        y_dtype_(dtype_from(y_dtype.empty() ? dtype : y_dtype)),
        x_halo_(x_halo),
        y_halo_(y_halo),
        b_halo_(b_halo),
        pool_(std::make_unique<ThreadPool>(threads)),
        spare_(spare_images) {
    const auto found = isa_from_name(isa);
    SADMM_CHECK(found && isa_supported(*found), "StepDoor: isa got one that is unknown or that this CPU lacks");
    isa_ = *found;
  }

  py::array_t<float> import_tensor(const py::array& x, std::array<int64_t, 3> sizes,
                                   const std::vector<int64_t>& channels) {
    const TensorView v = tensor_of("x", x, false);
    Memory y = output(v.sizes[0], sizes);
    const auto step = import_step(v, y.planes, isa_, channels);
    return go(*step, {v.data}, y);
  }

  void export_tensor(const Floats& x, const py::array& y) {
    Memory from = input(x, x_halo_, dtype_);
    TensorView v = tensor_of("y", y, true);
    const auto step = export_step(from.planes, v, from.images, isa_);
    kernel = step->kernel();
    const void* in = from.data();
    step->run({&in, 1}, v.data, from.images, *pool_);
  }

  py::array_t<float> copy(const Floats& x, const MaybeFloats& residual, const py::dict& epilogue, bool in_place) {
    Memory from = input(x, x_halo_, dtype_);
    Epilogue e = epilogue_from(epilogue);
    if (!residual) {
      Memory y = output(from.images, sizes_of(from.planes));
      return go(*copy_step(from.planes, y.planes, nullptr, e, from.images, isa_), {from.data()}, y);
    }
    e.residual = true;
    Memory b = input(*residual, in_place ? y_halo_ : b_halo_, dtype_);
    if (in_place) {
      return go(*copy_step(from.planes, b.planes, &b.planes, e, from.images, isa_), {from.data(), b.data()}, b, false);
    }
    Memory y = output(from.images, sizes_of(from.planes));
    return go(*copy_step(from.planes, y.planes, &b.planes, e, from.images, isa_), {from.data(), b.data()}, y);
  }

  py::array_t<float> scale_shift(const Floats& x, const std::vector<float>& scale, const std::vector<float>& shift,
                                 const py::dict& epilogue) {
    Memory from = input(x, x_halo_, dtype_), y = output(from.images, sizes_of(from.planes));
    const auto step = scale_shift_step(from.planes, y.planes, scale, shift, epilogue_from(epilogue), from.images, isa_);
    return go(*step, {from.data()}, y);
  }

  py::array_t<float> multiply(const Floats& x, const Floats& gate, const py::dict& epilogue) {
    Memory from = input(x, x_halo_, dtype_), b = input(gate, b_halo_, dtype_);
    Memory y = output(from.images, sizes_of(from.planes));
    const auto step = multiply_step(from.planes, b.planes, y.planes, epilogue_from(epilogue), from.images, isa_);
    return go(*step, {from.data(), b.data()}, y);
  }

  py::array_t<float> flatten(const Floats& x) {
    Memory from = input(x, x_halo_, dtype_);
    const auto [c, h, w] = sizes_of(from.planes);
    Memory y = output(from.images, {c * h * w, 1, 1});
    return go(*flatten_step(from.planes, y.planes, from.images, isa_), {from.data()}, y);
  }

  py::array_t<float> pool(const Floats& x, bool max, Pair size, Pair kernel_size, Pair stride, Pair padding,
                          Pair dilation, bool count_include_pad, int64_t divisor_override) {
    Memory from = input(x, x_halo_, dtype_), y = output(from.images, {from.planes.channels, size[0], size[1]});
    Pool p{.max = max, .count_include_pad = count_include_pad, .divisor_override = divisor_override};
    for (int i = 0; i < 2; ++i) {
      p.kernel[i] = kernel_size[i];
      p.stride[i] = stride[i];
      p.padding[i] = padding[i];
      p.dilation[i] = dilation[i];
    }
    return go(*pool_step(from.planes, y.planes, p, from.images, isa_), {from.data()}, y);
  }

  py::array_t<float> adaptive_pool(const Floats& x, bool max, Pair size) {
    Memory from = input(x, x_halo_, dtype_), y = output(from.images, {from.planes.channels, size[0], size[1]});
    return go(*adaptive_pool_step(from.planes, y.planes, max, from.images, isa_), {from.data()}, y);
  }

  py::array_t<float> linear(const Floats& x, const Floats& weight, const MaybeFloats& bias, const Ints& taps,
                            const Ints& block_filters, const Ints& block_taps, const MaybeFloats& residual,
                            const py::dict& epilogue) {
    LinearSpec s{.in_features = x.shape(1),
                 .out_features = 0,
                 .weight = vector_of(weight),
                 .bias = {},
                 .taps = taps,
                 .block_filters = block_filters,
                 .block_taps = block_taps,
                 .epilogue = epilogue_from(epilogue)};
    for (const int32_t f : block_filters) s.out_features += f;
    if (bias) s.bias = vector_of(*bias);
    s.epilogue.residual = residual.has_value();
    Memory from = input(x, x_halo_, dtype_), y = output(from.images, {s.out_features, 1, 1});
    const auto packed = pack_linear(s, dtype_, isa_);
    if (!residual) return go(*packed->plan(from.planes, y.planes, nullptr, from.images), {from.data()}, y);
    Memory b = input(*residual, b_halo_, dtype_);
    return go(*packed->plan(from.planes, y.planes, &b.planes, from.images), {from.data(), b.data()}, y);
  }

  py::array_t<float> depthwise(const Floats& x, int64_t filters, Pair kernel_size, const Floats& weight,
                               const MaybeFloats& bias, const Ints& taps, const Ints& block_filters,
                               const Ints& block_taps, Pair stride, Pair padding, Pair dilation,
                               const MaybeFloats& residual, const py::dict& epilogue) {
    ConvSpec s;
    s.in_channels = s.groups = x.shape(1);
    s.out_channels = filters;
    for (int i = 0; i < 2; ++i) {
      s.kernel[i] = kernel_size[i];
      s.stride[i] = stride[i];
      s.padding[i] = padding[i];
      s.dilation[i] = dilation[i];
    }
    s.weight = vector_of(weight);
    if (bias) s.bias = vector_of(*bias);
    s.taps = taps;
    s.block_filters = block_filters;
    s.block_taps = block_taps;
    s.epilogue = epilogue_from(epilogue);
    s.epilogue.residual = residual.has_value();
    Memory from = input(x, x_halo_, dtype_);
    Memory y = output(from.images, {filters, s.out_size(0, from.planes.height), s.out_size(1, from.planes.width)});
    const auto packed = pack_conv_depthwise(s, dtype_, isa_);
    if (!residual) return go(*packed->plan(from.planes, y.planes, nullptr, from.images), {from.data()}, y);
    Memory b = input(*residual, b_halo_, dtype_);
    return go(*packed->plan(from.planes, y.planes, &b.planes, from.images), {from.data(), b.data()}, y);
  }

  std::string kernel;
  int repeats = 0;

 private:
  static std::vector<float> vector_of(const Floats& a) { return {a.data(), a.data() + a.size()}; }
  static std::array<int64_t, 3> sizes_of(const Planes& p) { return {p.channels, p.height, p.width}; }

  Memory input(const Floats& x, const Sides& halo, Dtype dtype) const {
    const auto at = [&](int d) { return x.ndim() > d ? static_cast<int64_t>(x.shape(d)) : 1; };
    Memory m(planes_of(dtype, at(0) + spare_, at(1), at(2), at(3), halo), at(0), halo.has_value());
    m.fill(x.data());
    return m;
  }
  Memory output(int64_t images, std::array<int64_t, 3> s) const {
    Memory m(planes_of(y_dtype_, images + spare_, s[0], s[1], s[2], y_halo_), images, y_halo_.has_value());
    m.mark();
    return m;
  }

  py::array_t<float> go(const Step& step, const std::vector<const void*>& inputs, Memory& y, bool mark = true) {
    kernel = step.kernel();
    Memory before = y;
    (void)mark;
    {
      py::gil_scoped_release release;
      step.run(inputs, y.data(), y.images, *pool_);
    }
    Memory after = y;
    after.mark();
    before.mark();
    SADMM_CHECK(after.f32 == before.f32 && after.bf16 == before.bf16, "StepDoor: ", kernel,
                " wrote outside of its output");
    auto values = y.values();
    py::gil_scoped_release release;
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < repeats; ++i) {
      const auto start = Clock::now();
      step.run(inputs, y.data(), y.images, *pool_);
      const double s = std::chrono::duration<double>(Clock::now() - start).count();
      times.push_back(s);
    }
    return values;
  }

  Isa isa_;
  Dtype dtype_, y_dtype_;
  Sides x_halo_, y_halo_, b_halo_;
  std::unique_ptr<ThreadPool> pool_;
  int64_t spare_;

 public:
  std::vector<double> times;
};

}  // namespace

void bind_steps(py::module_& m) {
  using py::arg;
  py::class_<Door>(m, "StepDoor", "Single steps of a segment, for tests.")
      .def(py::init<const std::string&, const std::string&, const std::string&, const Sides&, const Sides&,
                    const Sides&, int, int64_t>(),
           arg("isa"), arg("dtype") = "f32", arg("y_dtype") = "", arg("x_halo") = Sides{{0, 0, 0, 0}},
           arg("y_halo") = Sides{{0, 0, 0, 0}}, arg("b_halo") = Sides{{0, 0, 0, 0}}, arg("threads") = 1,
           arg("spare_images") = 0)
      .def_readonly("kernel", &Door::kernel)
      .def_readwrite("repeats", &Door::repeats, "How often a step runs again, timed into times.")
      .def_readwrite("times", &Door::times)
      .def("import_tensor", &Door::import_tensor, arg("x"), arg("sizes"), arg("channels") = std::vector<int64_t>{})
      .def("export_tensor", &Door::export_tensor, arg("x"), arg("y"))
      .def("copy", &Door::copy, arg("x"), arg("residual") = py::none(), arg("epilogue") = py::dict(),
           arg("in_place") = false)
      .def("scale_shift", &Door::scale_shift, arg("x"), arg("scale"), arg("shift"), arg("epilogue") = py::dict())
      .def("multiply", &Door::multiply, arg("x"), arg("gate"), arg("epilogue") = py::dict())
      .def("flatten", &Door::flatten, arg("x"))
      .def("pool", &Door::pool, arg("x"), arg("max"), arg("size"), arg("kernel_size"), arg("stride"),
           arg("padding") = Pair{0, 0}, arg("dilation") = Pair{1, 1}, arg("count_include_pad") = true,
           arg("divisor_override") = 0)
      .def("linear", &Door::linear, arg("x"), arg("weight"), arg("bias"), arg("taps"), arg("block_filters"),
           arg("block_taps"), arg("residual") = py::none(), arg("epilogue") = py::dict())
      .def("depthwise", &Door::depthwise, arg("x"), arg("filters"), arg("kernel_size"), arg("weight"), arg("bias"),
           arg("taps"), arg("block_filters"), arg("block_taps"), arg("stride") = Pair{1, 1},
           arg("padding") = Pair{0, 0}, arg("dilation") = Pair{1, 1}, arg("residual") = py::none(),
           arg("epilogue") = py::dict())
      .def("adaptive_pool", &Door::adaptive_pool, arg("x"), arg("max"), arg("size"));
}

}  // namespace structadmm::bindings
