// _core: nonzeros_step, the door of the tests to the family "nonzeros" on planes.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/check.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "bindings/python/bind.h"
#include "ops/conv.h"
#include "ops/steps.h"

namespace structadmm::bindings {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Pair = std::array<int64_t, 2>;
constexpr auto kOp = "nonzeros_step";

// Values between zeros; NaN where nobody may look.
std::vector<float> filled(const Planes& p, int64_t images, const float* values) {
  std::vector<float> memory(static_cast<size_t>(p.readable), std::numeric_limits<float>::quiet_NaN());
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t y = -p.halo.top; y < p.height + p.halo.bottom; ++y) {
        for (int64_t x = -p.halo.left; x < p.width + p.halo.right; ++x) memory[p.at(n, c, y, x)] = 0.0f;
      }
    }
  }
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t y = 0; y < p.height; ++y) {
        for (int64_t x = 0; x < p.width; ++x) memory[p.at(n, c, y, x)] = values ? *values++ : 0.0f;
      }
    }
  }
  return memory;
}

std::tuple<Floats, std::string> run(const Floats& x, const std::vector<float>& weight, const std::vector<float>& bias,
                                    const std::vector<int32_t>& taps, const std::vector<int32_t>& block_filters,
                                    const std::vector<int32_t>& block_taps, const Pair& kernel, const Pair& stride,
                                    const Pair& padding, const Pair& dilation, int64_t groups,
                                    const std::optional<Floats>& residual, bool in_place, int activation, float low,
                                    float high, const std::array<int64_t, 4>& extra_halo, int64_t planned_images,
                                    bool linear, const std::string& isa, int threads) {
  SADMM_CHECK(x.ndim() == 4, kOp, ": x got ", x.ndim(), " dimensions, wanted [batch, channels, height, width]");
  const auto found = isa_from_name(isa);
  SADMM_CHECK(found && isa_supported(*found), kOp, ": isa got '", isa, "', wanted one that this CPU has");
  const int64_t images = x.shape(0), most = std::max(images, planned_images);
  int64_t filters = 0;
  for (const int32_t n : block_filters) filters += n;
  Epilogue epilogue;
  epilogue.activation = static_cast<Activation>(activation);
  epilogue.low = low;
  epilogue.high = high;
  epilogue.residual = residual.has_value();

  ConvSpec s;
  s.in_channels = x.shape(1);
  s.out_channels = filters;
  s.groups = groups;
  for (int i = 0; i < 2; ++i) {
    s.kernel[i] = kernel[i];
    s.stride[i] = stride[i];
    s.padding[i] = padding[i];
    s.dilation[i] = dilation[i];
  }
  s.weight = weight;
  s.bias = bias;
  s.taps = taps;
  s.block_filters = block_filters;
  s.block_taps = block_taps;
  s.epilogue = epilogue;
  int64_t out[2];
  Halo halo;
  int64_t behind[2];
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(stride[i] >= 1, kOp, ": stride got ", stride[i], ", wanted at least 1");
    out[i] = s.out_size(i, x.shape(2 + i));
    behind[i] = (out[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] - padding[i] - x.shape(2 + i) + 1;
  }
  halo.top = padding[0] + extra_halo[0];
  halo.left = padding[1] + extra_halo[1];
  halo.bottom = std::max<int64_t>(behind[0], 0) + extra_halo[2];
  halo.right = std::max<int64_t>(behind[1], 0) + extra_halo[3];
  const Planes px = arena_planes(Dtype::kF32, most, s.in_channels, x.shape(2), x.shape(3), halo);
  const Halo around = linear ? Halo{} : Halo{extra_halo[1], extra_halo[2], extra_halo[3], extra_halo[0]};
  const Planes py_ = arena_planes(Dtype::kF32, most, filters, out[0], out[1], around);

  std::unique_ptr<Step> step;
  if (linear) {
    LinearSpec l{.in_features = s.in_channels, .out_features = filters, .weight = weight, .bias = bias, .taps = taps,
                 .block_filters = block_filters, .block_taps = block_taps, .epilogue = epilogue};
    step = pack_linear_nonzeros(l, *found)->plan(px, py_, residual ? &py_ : nullptr, most);
  } else {
    step = pack_conv_nonzeros(s, *found)->plan(px, py_, residual ? &py_ : nullptr, most);
  }
  const auto in = filled(px, images, x.data());
  auto more = filled(py_, images, residual ? residual->data() : nullptr);
  auto y = in_place ? more : filled(py_, images, nullptr);
  const auto before = y;
  const void* inputs[2] = {in.data(), in_place ? y.data() : more.data()};
  {
    py::gil_scoped_release release;
    ThreadPool pool(threads);
    step->run({inputs, residual ? 2u : 1u}, y.data(), images, pool);
  }
  Floats result({images, filters, out[0], out[1]});
  float* to = result.mutable_data();
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < filters; ++c) {
      for (int64_t row = 0; row < out[0]; ++row) {
        for (int64_t col = 0; col < out[1]; ++col) {
          float& value = y[py_.at(n, c, row, col)];
          *to++ = value;
          value = before[py_.at(n, c, row, col)];
        }
      }
    }
  }
  for (size_t i = 0; i < y.size(); ++i) {
    const bool kept = y[i] == before[i] || (std::isnan(y[i]) && std::isnan(before[i]));
    SADMM_CHECK(kept, kOp, ": y got a write outside the planes at ", i);
  }
  return {result, step->kernel()};
}

}  // namespace

void bind_nonzeros(py::module_& m) {
  const float inf = std::numeric_limits<float>::infinity();
  m.def("nonzeros_step", &run, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("taps"),
        py::arg("block_filters"), py::arg("block_taps"), py::arg("kernel_size"), py::arg("stride") = Pair{1, 1},
        py::arg("padding") = Pair{0, 0}, py::arg("dilation") = Pair{1, 1}, py::arg("groups") = 1,
        py::arg("residual") = py::none(), py::arg("in_place") = false, py::arg("activation") = 0,
        py::arg("low") = -inf, py::arg("high") = inf, py::arg("extra_halo") = std::array<int64_t, 4>{},
        py::arg("planned_images") = 0, py::arg("linear") = false, py::arg("isa") = "scalar", py::arg("threads") = 1,
        "One run of a convolution over single weights on planes, and the name of its kernel.");
}

}  // namespace structadmm::bindings
