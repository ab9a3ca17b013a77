#include "ops/phases.h"

#include <algorithm>
#include <utility>

#include "base/div_up.h"

namespace structadmm {
namespace {

constexpr int64_t kCopyFloats = 128 * 1024;  // of several images at a time: what L2 holds beside some panels

// Of one phase on one axis: how many of its places lie before x, how many in x, and where the first of those is.
struct Axis {
  int64_t before, inside, first;
};

Axis axis_of(int64_t phase, int64_t stride, int64_t padding, int64_t places, int64_t size) {
  const int64_t at = phase - padding, before = std::min(places, at < 0 ? div_up(-at, stride) : 0),
                first = at + before * stride;
  const int64_t inside = first < size ? std::min(div_up(size - first, stride), places - before) : 0;
  return {before, inside, first};
}

}  // namespace

// Some strides are not copied in vectors.
double row_copy_cost(int64_t stride, int64_t columns, int lanes) {
  constexpr double kRow = 6, kPixel = 1.5;
  const double vector = stride == 1 ? 3 : stride == 2 ? 5 : stride == 4 ? 8 : kPixel * lanes;
  return kRow + vector * static_cast<double>(div_up(columns, int64_t{lanes}));
}

int64_t OnPhases::plane_of(const kernels::Tap& tap) const {
  const std::pair plane{int64_t{tap.channel}, places[tap.position].phase};
  return std::lower_bound(read.begin(), read.end(), plane) - read.begin();
}

std::optional<OnPhases> phases_of(const Packed& packed, const ConvPlanes& planes, int64_t images, int lanes, Isa isa) {
  constexpr int64_t kMost = 1 << 28;  // places in a plane
  const kernels::PackedHeader& h = *packed.header;
  const auto& [stride, padding, dilation] = planes.geometry;
  const Planes& x = planes.x;
  const int64_t kernel[] = {h.kernel_h, h.kernel_w}, in[] = {x.height, x.width},
                out[] = {planes.y.height, planes.y.width};
  int64_t size[2];  // of a plane of the copy
  for (const int a : {0, 1}) size[a] = out[a] + dilation[a] * (kernel[a] - 1) / stride[a];
  if (size[0] * static_cast<double>(size[1]) > kMost) return std::nullopt;

  OnPhases result{.phases = {.copy = kernels::pad_copy(isa), .shapes = {}, .planes = {}},
                  .planes = planes,
                  .places = {},
                  .read = {}};
  std::vector<std::pair<int64_t, int64_t>> phases;  // first row and column of each
  for (int64_t i = 0; i < kernel[0]; ++i) {
    for (int64_t j = 0; j < kernel[1]; ++j) {
      const int64_t row = i * dilation[0], column = j * dilation[1];
      const std::pair phase{row % stride[0], column % stride[1]};
      const auto found = std::find(phases.begin(), phases.end(), phase);
      result.places.push_back({found - phases.begin(), row / stride[0] * size[1] + column / stride[1]});
      if (found == phases.end()) phases.push_back(phase);
    }
  }
  for (int64_t t = 0; t < h.taps; ++t) {
    const kernels::Tap& tap = packed.taps[t];
    result.read.emplace_back(tap.channel, result.places[tap.position].phase);
  }
  std::sort(result.read.begin(), result.read.end());
  result.read.erase(std::unique(result.read.begin(), result.read.end()), result.read.end());

  Phases& p = result.phases;
  const auto count = static_cast<int64_t>(result.read.size()), image = size[0] * size[1];
  p.images = std::clamp<int64_t>(kCopyFloats / std::max<int64_t>(count * image, 1), 1, images);
  std::vector<int64_t> first;  // in a channel of x, by phase
  for (const auto& [row_phase, column_phase] : phases) {
    const Axis row = axis_of(row_phase, stride[0], padding[0], size[0], in[0]),
               column = axis_of(column_phase, stride[1], padding[1], size[1], in[1]);
    const bool empty = row.inside == 0 || column.inside == 0;
    first.push_back(empty ? 0 : x.origin + row.first * x.pitch + column.first);
    p.shapes.push_back({.src = nullptr,
                        .image_stride = x.image_stride,
                        .row_stride = x.pitch * stride[0],
                        .col_stride = stride[1],
                        .dst = nullptr,
                        .images = 0,
                        .image_rows = size[0],
                        .pitch = size[1],
                        .tail = 0,
                        .lead_rows = row.before,
                        .rows = empty ? 0 : row.inside,
                        .lead_cols = column.before,
                        .cols = empty ? 0 : column.inside});
  }
  for (const auto& [channel, phase] : result.read) {
    p.planes.push_back({channel * x.channel_stride + first[phase], static_cast<int32_t>(phase)});
  }
  Planes& to = result.planes.x;
  to = {.dtype = Dtype::kF32, .channels = count, .height = size[0], .width = size[1], .halo = {}};
  to.pitch = size[1];
  to.image_stride = image;
  // As arena_planes: an odd number of lines apart, with room for what pad_copy writes behind them.
  constexpr int64_t kLine = 16;
  to.channel_stride = (div_up(p.images * image + size[1] + kernels::kPadCopySpill, kLine) | 1) * kLine;
  to.readable = count * to.channel_stride + kSlack;
  p.image_stride = x.image_stride;
  p.plane_stride = to.channel_stride;
  result.planes.geometry = {{1, 1}, {0, 0}, {1, 1}};
  result.cost = static_cast<double>(count * size[0]) * row_copy_cost(stride[1], size[1], lanes);
  return result;
}

void copy_phases(const Phases& phases, const float* x, int64_t images, float* to, int64_t tasks, Parallel& parallel) {
  const int64_t count = phases.count();
  tasks = std::min(tasks, count);
  parallel.run(tasks, [&](int64_t task) {
    for (int64_t i = task * count / tasks; i < (task + 1) * count / tasks; ++i) {
      const Phases::Plane& plane = phases.planes[i];
      kernels::PadCopyArgs a = phases.shapes[plane.shape];
      a.src = x + plane.from;
      a.dst = to + i * phases.plane_stride;
      a.images = images;
      phases.copy(a);
    }
  });
}

}  // namespace structadmm
