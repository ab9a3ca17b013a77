#include "ops/linear_compact.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/check.h"

namespace structadmm {
namespace {

constexpr int64_t kSerialMacs = 1 << 20;  // ten microseconds of work: a parallel region costs about as much

}  // namespace

LinearShape linear_shape(const char* op, const TensorView& x, Device device, int64_t in_features) {
  SADMM_CHECK(x.dtype == Dtype::kF32, op, ": x got ", dtype_name(x.dtype), ", wanted f32");
  SADMM_CHECK(x.device == device, op, ": x got a tensor on another device, wanted that of the weight");
  SADMM_CHECK(x.dims >= 1, op, ": x got a scalar, wanted [..., features]");
  const int64_t features = x.sizes[x.dims - 1];
  SADMM_CHECK(features == in_features, op, ": x has ", features, " features, wanted ", in_features);
  LinearShape s{.rows = 1, .x_stride = features};
  for (int d = 0; d + 1 < x.dims; ++d) s.rows *= x.sizes[d];
  if (x.dims == 2 && x.sizes[0] > 1) s.x_stride = x.strides[0];
  int64_t wanted = 1;
  bool rows = s.rows == 0 || features == 1 || x.strides[x.dims - 1] == 1;
  for (int d = x.dims - 1; d >= 0 && s.rows > 0; wanted *= x.sizes[d--]) {
    const bool free = x.sizes[d] == 1 || (x.dims == 2 && d == 0);
    rows = rows && (free || x.strides[d] == wanted);
  }
  constexpr int64_t kMost = 1 << 27;  // the offsets of the rows of a tile are 32 bits wide
  SADMM_CHECK(rows && s.x_stride >= -kMost && s.x_stride <= kMost, op, ": x got shape ", x.shape(),
              " with strides, wanted contiguous rows");
  return s;
}

void linear_compact(const LinearShape& s, const float* x, const Packed& packed, float* y, Isa isa, Parallel& parallel) {
  const kernels::GemmCompact& k = kernels::gemm_compact(isa);
  const int64_t filters = packed.header->out_channels;
  std::vector<std::pair<int64_t, int>> jobs;  // first panel, panels
  for (int64_t i = 0; i < static_cast<int64_t>(packed.panels.size()); i += jobs.back().second) {
    jobs.emplace_back(i, next_panels(packed, i, k));
  }
  const std::vector<int64_t> offset = features_of(packed);
  const int64_t tile = k.pixels[0][0], tiles = (s.rows + tile - 1) / tile;
  const int64_t units = static_cast<int64_t>(jobs.size()) * tiles;
  const bool serial = packed.header->weights * s.rows < kSerialMacs || parallel.threads() == 1;
  const int64_t tasks = serial ? 1 : std::min<int64_t>(units, 4 * parallel.threads());
  int32_t pixel[kernels::kMaxPixels] = {}, out[kernels::kMaxPixels] = {};
  for (int i = 0; i < kernels::kMaxPixels; ++i) {
    pixel[i] = static_cast<int32_t>(i * s.x_stride);
    out[i] = static_cast<int32_t>(i * filters);
  }
  parallel.run(tasks, [&](int64_t task) {
    for (int64_t u = task * units / tasks; u < (task + 1) * units / tasks; ++u) {
      const auto& [first, panels] = jobs[u / tiles];
      const int64_t row = u % tiles * tile;
      const Panel &panel = packed.panels[first], &last = packed.panels[first + panels - 1];
      kernels::run_rows(k, panels,
                        {
                            .x = x + row * s.x_stride,
                            .offset = offset.data() + panel.first_tap,
                            .n_taps = panel.n_taps,
                            .w = packed.weights + panel.weight,
                            .panel_stride = panel.n_taps * panel.width,
                            .start = packed.bias + panel.first_filter,
                            .filters = last.first_filter + last.filters - panel.first_filter,
                            .pixel = pixel,
                            .row = out,
                            .out = {.y = y + row * filters + panel.first_filter, .y_stride = 1},
                        },
                        panel.width, static_cast<int>(std::min(tile, s.rows - row)));
    }
  });
}

}  // namespace structadmm
