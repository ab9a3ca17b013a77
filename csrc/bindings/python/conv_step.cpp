// _core.conv_step: the convolution families of ops/conv.h one step at a time, over NumPy arrays. A door for tests: it
// makes planes between pages that may not be touched, runs the step, and looks at what lies around the elements of y.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/div_up.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "bindings/python/bind.h"
#include "ops/conv.h"
#include "ops/merge_blocks.h"
#include "ops/steps.h"

namespace structadmm::bindings {
namespace {

namespace py = pybind11;
using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;
constexpr auto kOp = "conv_step";

// A linear layer, planned for maps of one pixel.
class LinearAsConv final : public PackedConv {
 public:
  explicit LinearAsConv(std::shared_ptr<const PackedLinear> linear) : linear_(std::move(linear)) {}
  const char* family() const override { return "linear"; }
  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    return linear_->plan(x, y, residual, images);
  }

 private:
  std::shared_ptr<const PackedLinear> linear_;
};

struct Family {
  const char* name;
  std::shared_ptr<const PackedConv> (*pack)(const ConvSpec&, Dtype, Isa);
};
constexpr Family kFamilies[] = {
    {"taps_f32", [](const ConvSpec& spec, Dtype, Isa isa) { return pack_conv_taps_f32(spec, isa); }},
    {"nonzeros", [](const ConvSpec& spec, Dtype, Isa isa) { return pack_conv_nonzeros(spec, isa); }},
    {"winograd", [](const ConvSpec& spec, Dtype, Isa isa) { return pack_conv_winograd(spec, isa); }},
    {"linear_nonzeros",
     [](const ConvSpec& s, Dtype, Isa isa) -> std::shared_ptr<const PackedConv> {
       return std::make_shared<LinearAsConv>(pack_linear_nonzeros(
           {s.in_channels, s.out_channels, s.weight, s.bias, s.taps, s.block_filters, s.block_taps, s.epilogue}, isa));
     }},
    {"taps_bf16", [](const ConvSpec& spec, Dtype, Isa isa) { return pack_conv_taps_bf16(spec, isa); }},
};

// Memory of a whole number of pages; the one before and the one behind may be neither read nor written. The elements
// lie at the end, or at the beginning.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end) : page_(sysconf(_SC_PAGESIZE)) {
    const int64_t inner = (std::max<int64_t>(bytes, 1) + page_ - 1) / page_ * page_;
    size_ = inner + 2 * page_;
    map_ = static_cast<std::byte*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    SADMM_CHECK(map_ != MAP_FAILED && mprotect(map_ + page_, inner, PROT_READ | PROT_WRITE) == 0, kOp,
                ": memory got none, wanted ", bytes, " bytes");
    data_ = map_ + page_ + (at_end ? inner - bytes : 0);
  }
  ~Guarded() { munmap(map_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  std::byte* data() const { return data_; }

 private:
  int64_t page_, size_;
  std::byte *map_, *data_;
};

uint32_t to_bits(Dtype dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == Dtype::kF32) return bits;
  return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

float from_bits(Dtype dtype, uint32_t bits) {
  if (dtype == Dtype::kBf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(const Planes& p, std::byte* data, int64_t at, uint32_t bits) {
  std::memcpy(data + at * dtype_size(p.dtype), &bits, static_cast<size_t>(dtype_size(p.dtype)));
}

uint32_t load(const Planes& p, const std::byte* data, int64_t at) {
  uint32_t bits = 0;
  std::memcpy(&bits, data + at * dtype_size(p.dtype), static_cast<size_t>(dtype_size(p.dtype)));
  return bits;
}

// Calls visit(place in planes, place in a contiguous array) for every element of `images` images.
template <class Visit>
void each(const Planes& p, int64_t images, const Visit& visit) {
  int64_t i = 0;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t y = 0; y < p.height; ++y) {
        for (int64_t x = 0; x < p.width; ++x) visit(p.at(n, c, y, x), i++);
      }
    }
  }
}

std::unique_ptr<Guarded> planes_of(const Planes& p, const Array& a, bool at_end) {
  auto memory = std::make_unique<Guarded>(p.readable * dtype_size(p.dtype), at_end);
  each(p, a.shape(0), [&](int64_t to, int64_t i) { store(p, memory->data(), to, to_bits(p.dtype, a.data()[i])); });
  return memory;
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"clamp",       "silu",    "gelu", "gelu_tanh", "hardswish",
                                    "hardsigmoid", "sigmoid", "tanh", "leaky_relu"};
  for (int i = 0; i < 9; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  fail(kOp, ": activation got '", name, "', wanted one of ops/epilogue.h");
}

ConvSpec spec_of(const py::dict& d) {
  ConvSpec s;
  const auto pair = [&](const char* name, int64_t (&to)[2]) {
    if (!d.contains(name)) return;
    const auto both = d[name].cast<std::array<int64_t, 2>>();
    std::copy(both.begin(), both.end(), to);
  };
  const auto number = [&](const char* name, auto& to) {
    if (d.contains(name)) to = d[name].cast<std::remove_reference_t<decltype(to)>>();
  };
  number("in_channels", s.in_channels);
  number("out_channels", s.out_channels);
  number("groups", s.groups);
  pair("kernel", s.kernel);
  pair("stride", s.stride);
  pair("padding", s.padding);
  pair("dilation", s.dilation);
  number("weight", s.weight);
  if (d.contains("bias") && !d["bias"].is_none()) number("bias", s.bias);
  number("taps", s.taps);
  number("block_filters", s.block_filters);
  number("block_taps", s.block_taps);
  number("low", s.epilogue.low);
  number("high", s.epilogue.high);
  number("slope", s.epilogue.slope);
  if (d.contains("activation")) s.epilogue.activation = activation_of(d["activation"].cast<std::string>());
  return s;
}

Planes planes(const std::string& layout, Dtype dtype, int64_t images, int64_t channels, int64_t height, int64_t width,
              Halo halo, const Grid& grid) {
  if (layout == "lanes") return lane_planes(dtype, images, channels, height, width, grid);
  if (layout == "tensor") {
    SADMM_CHECK(halo == Halo{}, kOp, ": halo got one, wanted none around a tensor");
    return tensor_planes(dtype, images, channels, height, width);
  }
  SADMM_CHECK(layout == "arena", kOp, ": layout got '", layout, "', wanted arena, tensor or lanes");
  return arena_planes(dtype, images, channels, height, width, halo);
}

py::tuple conv_step(const std::string& family, const std::string& isa_of, const py::dict& dict, const Array& x,
                    const std::optional<Array>& residual, const std::string& dtype_of, const std::string& x_dtype_of,
                    const std::string& y_dtype_of, const std::string& x_layout, const std::string& y_layout,
                    const std::string& residual_layout, const std::array<int64_t, 4>& x_halo,
                    const std::array<int64_t, 4>& y_halo, const std::array<int64_t, 4>& residual_halo,
                    const std::array<int64_t, 3>& grid_of, int64_t spare_images, int threads,
                    const std::string& guard) {
  const Family* found =
      std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const Family& f) { return family == f.name; });
  SADMM_CHECK(found != std::end(kFamilies), kOp, ": family got '", family, "', wanted one that the build has");
  const auto isa = isa_from_name(isa_of);
  SADMM_CHECK(isa && isa_supported(*isa), kOp, ": isa got '", isa_of, "', wanted one that this CPU has");
  const auto dtype_named = [](const std::string& name) {
    SADMM_CHECK(name == "f32" || name == "bf16", kOp, ": dtype got '", name, "', wanted f32 or bf16");
    return name == "f32" ? Dtype::kF32 : Dtype::kBf16;
  };
  const Dtype dtype = dtype_named(dtype_of);
  const Dtype x_dtype = x_dtype_of.empty() ? dtype : dtype_named(x_dtype_of);
  const Dtype y_dtype = y_dtype_of.empty() ? dtype : dtype_named(y_dtype_of);
  SADMM_CHECK(x.ndim() == 4, kOp, ": x got ", x.ndim(), " dimensions, wanted 4");

  ConvSpec spec = spec_of(dict);
  spec.epilogue.residual = residual.has_value();
  const auto packed = found->pack(spec, dtype, *isa);
  for (const auto& layout : {x_layout, y_layout, residual_layout}) {
    SADMM_CHECK(layout != "lanes" || packed->lanes() > 0, kOp,
                ": got planes in lanes, wanted a family that takes them");
  }

  const int64_t images = x.shape(0), planned = images + spare_images, height = x.shape(2), width = x.shape(3);
  const int64_t out_h = spec.out_size(0, height), out_w = spec.out_size(1, width);
  const auto behind = [&](int axis, int64_t in, int64_t out) {
    return std::max<int64_t>(0, (out - 1) * spec.stride[axis] + spec.dilation[axis] * (spec.kernel[axis] - 1) -
                                    spec.padding[axis] - (in - 1));
  };
  Halo in_halo{.top = spec.padding[0] + x_halo[0],
               .left = spec.padding[1] + x_halo[1],
               .bottom = behind(0, height, out_h) + x_halo[2],
               .right = behind(1, width, out_w) + x_halo[3]};
  if (x_layout == "tensor") in_halo = {};  // whether the family takes that or not
  const auto halo_of = [](const std::array<int64_t, 4>& h) {
    return Halo{.top = h[0], .left = h[1], .bottom = h[2], .right = h[3]};
  };
  const Grid grid{.images = grid_of[0], .rows = grid_of[1], .cols = grid_of[2]};
  const Planes px = planes(x_layout, x_dtype, planned, x.shape(1), height, width, in_halo, grid);
  const Planes py_ = planes(y_layout, y_dtype, planned, spec.out_channels, out_h, out_w, halo_of(y_halo), grid);
  const bool in_place = residual && residual_layout == "y";
  SADMM_CHECK(!in_place || y_dtype == dtype, kOp, ": y_dtype got another one than the residual in y's place");
  const Planes pr = in_place || !residual ? py_
                                          : planes(residual_layout, dtype, planned, spec.out_channels, out_h, out_w,
                                                   halo_of(residual_halo), grid);
  if (residual) {
    SADMM_CHECK(residual->ndim() == 4 && residual->shape(0) == images && residual->shape(1) == spec.out_channels &&
                    residual->shape(2) == out_h && residual->shape(3) == out_w,
                kOp, ": residual got another shape than y");
  }

  const bool at_end = guard == "end";
  const auto in = planes_of(px, x, at_end);
  std::unique_ptr<Guarded> added = residual ? planes_of(pr, *residual, at_end) : nullptr;
  std::unique_ptr<Guarded> fresh;
  if (!in_place) {
    // What is not written shows as NaN; where nothing may be written are zeros.
    fresh = std::make_unique<Guarded>(py_.readable * dtype_size(y_dtype), at_end);
    each(py_, images,
         [&](int64_t to, int64_t) { store(py_, fresh->data(), to, to_bits(y_dtype, __builtin_nanf(""))); });
  }
  std::byte* const out = in_place ? added->data() : fresh->data();
  const std::unique_ptr<Step> step = packed->plan(px, py_, residual ? &pr : nullptr, planned);
  const std::vector<const void*> inputs =
      residual ? std::vector<const void*>{in->data(), added->data()} : std::vector<const void*>{in->data()};
  {
    py::gil_scoped_release release;
    ThreadPool pool(threads);
    step->run(inputs, out, images, pool);
  }
  std::vector<char> inside(static_cast<size_t>(py_.readable), 0);
  // Lanes without an image may hold anything.
  const int64_t room = py_.in_lanes() ? div_up(planned, grid.images) * grid.images : planned;
  each(py_, room, [&](int64_t at, int64_t) { inside[at] = 1; });
  for (int64_t i = 0; i < py_.readable; ++i) {
    const float value = from_bits(y_dtype, load(py_, out, i));
    SADMM_CHECK(inside[i] || value == 0.0f, kOp, ": the halo of y got ", value, " at ", i, ", wanted zeros");
  }
  Array y({images, spec.out_channels, out_h, out_w});
  each(py_, images, [&](int64_t from, int64_t i) { y.mutable_data()[i] = from_bits(y_dtype, load(py_, out, from)); });
  return py::make_tuple(y, step->kernel());
}

}  // namespace

void bind_conv_step(py::module_& m) {
  using Four = std::array<int64_t, 4>;
  m.def("conv_step", &conv_step, py::arg("family"), py::arg("isa"), py::arg("spec"), py::arg("x"),
        py::arg("residual") = py::none(), py::kw_only(), py::arg("dtype") = "f32", py::arg("x_dtype") = "",
        py::arg("y_dtype") = "", py::arg("x_layout") = "arena", py::arg("y_layout") = "arena",
        py::arg("residual_layout") = "arena", py::arg("x_halo") = Four{}, py::arg("y_halo") = Four{},
        py::arg("residual_halo") = Four{}, py::arg("grid") = std::array<int64_t, 3>{0, 1, 1},
        py::arg("spare_images") = 0, py::arg("threads") = 1, py::arg("guard") = "end",
        "One step of a convolution family on planes: (y, kernels). spec: the fields of ConvSpec and activation, low, "
        "high, slope. x_dtype, y_dtype: of the caller's own tensors, where not dtype. x_halo, y_halo, residual_halo: "
        "top, left, bottom, right, of x beyond what the padding needs; residual_layout 'y': in y's place; "
        "grid: images, rows, columns of the layouts 'lanes'; "
        "spare_images: planned, but absent; guard: whether what lies before ('start') or behind ('end') faults.");
  m.def(
      "merge_blocks",
      [](const py::dict& spec, int64_t panel, int64_t product, int64_t unit) {
        const ConvSpec s = merge_blocks(spec_of(spec), {.panel = panel, .product = product, .unit = unit});
        return py::make_tuple(s.weight, s.taps, s.block_filters, s.block_taps);
      },
      py::arg("spec"), py::kw_only(), py::arg("panel"), py::arg("product"), py::arg("unit"),
      "(weight, taps, block_filters, block_taps) in the blocks of ops/merge_blocks.h.");
  m.def("conv_families", [] {
    std::vector<std::string> names;
    for (const Family& f : kFamilies) names.emplace_back(f.name);
    return names;
  });
}

}  // namespace structadmm::bindings
