#include "ops/conv_compact.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/div_up.h"
#include "base/scratch.h"
#include "kernels/pad_copy/pad_copy.h"
#include "ops/tap_plan.h"

namespace structadmm {
namespace {

using kernels::PadCopyArgs;

constexpr auto kOp = "conv2d_compact";
constexpr int64_t kScratchFloats = 64 * 1024;  // images copied at a time: with some panels and their part of y in L2
constexpr int64_t kSerialMacs = 1 << 20;       // ten microseconds of work: two parallel regions would cost as much

struct Plan {
  bool direct = false;  // reads x where it is
  int64_t chunk = 1;    // images at a time
  int64_t tail = 0;     // of a plane of the padded copy: floats behind its last image
  TapPlan taps;
};

// Of the last output's kernel, what lies behind the input.
int64_t behind(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return std::max<int64_t>(0, (out - 1) * stride + dilation * (kernel - 1) - padding - (in - 1));
}

// The planes of a padded copy of `images` images, channels so far apart that what pad_copy spills meets no other.
Planes scratch_planes(const Conv2dShape& s, const kernels::PackedHeader& p, int64_t images) {
  Planes x = arena_planes(Dtype::kF32, images, s.channels, s.height, s.width,
                          {.top = s.padding[0],
                           .left = s.padding[1],
                           .bottom = behind(s.height, s.out_h, p.kernel_h, s.stride[0], s.padding[0], s.dilation[0]),
                           .right = behind(s.width, s.out_w, p.kernel_w, s.stride[1], s.padding[1], s.dilation[1])});
  if (s.height == 1 && s.width == 1 && x.halo == Halo{}) x.image_stride = 1;  // not rows of features
  const int64_t plane = x.origin + images * x.image_stride + x.halo.right + x.halo.left + kernels::kPadCopySpill;
  x.channel_stride = (div_up(plane, 16) | 1) * 16;
  x.readable = s.channels * x.channel_stride + kSlack;
  return x;
}

Plan make_plan(const Conv2dShape& s, const Packed& packed, Isa isa) {
  const kernels::PackedHeader& p = *packed.header;
  const int64_t batch = std::max<int64_t>(s.batch, 1), outputs = s.out_h * s.out_w;
  const ConvGeometry geometry{{s.stride[0], s.stride[1]}, {s.padding[0], s.padding[1]}, {s.dilation[0], s.dilation[1]}};
  const bool forward = s.x_strides[0] >= 0 && s.x_strides[1] >= 0 && s.x_strides[2] >= 0 && s.x_strides[3] == 1;
  const bool unpadded = (s.padding[0] == 0 && s.padding[1] == 0) ||
                        (forward && batch == 1 && takes_edges(packed, geometry, batch, s.height, s.width, isa));
  Plan plan;
  // Small images of a batch make better tiles where they are neighbours in memory.
  plan.direct = unpadded && forward && (batch == 1 || outputs >= 64);
  const auto as_it_is = [&] {
    Planes x = tensor_planes(Dtype::kF32, batch, s.channels, s.height, s.width);
    x.pitch = s.x_strides[2];
    x.channel_stride = s.x_strides[1];
    x.image_stride = s.x_strides[0];
    x.readable = x.at(batch - 1, s.channels - 1, s.height - 1, s.width - 1) + 1;
    return x;
  };
  const auto taps = [&](const Planes& x, int64_t images, bool phases) {
    const Planes y = tensor_planes(Dtype::kF32, images, p.out_channels, s.out_h, s.out_w);
    return plan_taps(kOp, packed, geometry, x, y, nullptr, {}, images, isa, phases);
  };
  if (plan.direct) {
    plan.chunk = batch;
    plan.taps = taps(as_it_is(), batch, true);
    return plan;
  }
  Planes x = scratch_planes(s, p, 1);
  plan.chunk = std::clamp<int64_t>(kScratchFloats / std::max<int64_t>(x.readable - kSlack, 1), 1, batch);
  x = scratch_planes(s, p, plan.chunk);
  plan.tail = x.origin + x.halo.left + x.halo.right;
  plan.taps = taps(x, plan.chunk, forward);
  if (!plan.taps.phases) return plan;
  // Phases are copied of the input, not of another copy.
  TapPlan on_input = taps(as_it_is(), batch, true);
  if (on_input.phases) return {.direct = true, .chunk = batch, .tail = 0, .taps = std::move(on_input)};
  plan.taps = taps(x, plan.chunk, false);
  return plan;
}

// The padded copy of `images` images, channels that no tap reads left as they are.
void copy_padded(const Plan& plan, const Conv2dShape& s, const Packed& packed, const float* x, int64_t images,
                 float* to, Isa isa, Parallel& parallel, int64_t tasks) {
  const Planes& planes = plan.taps.planes.x;
  const auto copy = kernels::pad_copy(isa);
  const auto channels = static_cast<int64_t>(packed.channels.size());
  parallel.run(tasks, [&](int64_t task) {
    for (int64_t i = task * channels / tasks; i < (task + 1) * channels / tasks; ++i) {
      const int64_t channel = packed.channels[i];
      copy(PadCopyArgs{.src = x + channel * s.x_strides[1],
                       .image_stride = s.x_strides[0],
                       .row_stride = s.x_strides[2],
                       .col_stride = s.x_strides[3],
                       .dst = to + channel * planes.channel_stride,
                       .images = images,
                       .image_rows = planes.image_stride / planes.pitch,
                       .pitch = planes.pitch,
                       .tail = plan.tail,
                       .lead_rows = planes.halo.top,
                       .rows = s.height,
                       .lead_cols = planes.halo.left,
                       .cols = s.width});
    }
  });
}

// The plan for a shape, kept by each calling thread: to make one costs as much as to convolve a small image.
const Plan& kept_plan(const Conv2dShape& s, const Packed& packed, Isa isa) {
  struct Entry {
    Conv2dShape shape;
    uint64_t structure;
    Isa isa;
    Plan plan;
  };
  constexpr size_t kEntries = 128;
  thread_local std::unique_ptr<Entry> entries[kEntries];
  const uint64_t structure = packed.header->structure;
  const uint64_t mix = structure ^ (static_cast<uint64_t>(s.batch) * 0x9e3779b97f4a7c15) ^
                       (static_cast<uint64_t>(s.height * s.width) * 0xc2b2ae3d27d4eb4f);
  // The tables of large maps are large, and cheap against the work: they share an entry.
  const bool large = s.out_h * s.out_w > (1 << 15);
  std::unique_ptr<Entry>& e = entries[large ? 0 : (mix ^ (mix >> 29)) % kEntries];
  if (!e || e->structure != structure || e->isa != isa || !(e->shape == s)) {
    e = nullptr;
    e = std::make_unique<Entry>(Entry{s, structure, isa, make_plan(s, packed, isa)});
  }
  return e->plan;
}

// The size of the output on an axis. Throws Error if there is none.
int64_t out_size(const char* op, int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  constexpr int64_t kMost = 1 << 28;
  SADMM_CHECK(stride >= 1 && stride < kMost, op, ": stride got ", stride, ", wanted at least 1");
  SADMM_CHECK(padding >= 0 && padding < kMost, op, ": padding got ", padding, ", wanted at least 0");
  SADMM_CHECK(dilation >= 1 && dilation < kMost, op, ": dilation got ", dilation, ", wanted at least 1");
  const int64_t reach = dilation * (kernel - 1) + 1;
  SADMM_CHECK(in + 2 * padding >= reach, op, ": x got size ", in, " with padding ", padding, ", wanted at least the ",
              reach, " that the kernel spans");
  return (in + 2 * padding - reach) / stride + 1;
}

}  // namespace

Conv2dShape conv2d_shape(const char* op, const TensorView& x, Device device, int64_t in_channels, int64_t kernel_h,
                         int64_t kernel_w, const Conv2dArgs& args) {
  SADMM_CHECK(x.dtype == Dtype::kF32, op, ": x got ", dtype_name(x.dtype), ", wanted f32");
  SADMM_CHECK(x.device == device, op, ": x got a tensor on another device, wanted that of the weight");
  SADMM_CHECK(x.dims == 4, op, ": x got shape ", x.shape(), ", wanted [batch, channels, height, width]");
  SADMM_CHECK(x.sizes[1] == in_channels, op, ": x has ", x.sizes[1], " channels, wanted ", in_channels);
  Conv2dShape s{};
  static_cast<Conv2dArgs&>(s) = args;
  s.batch = x.sizes[0];
  s.channels = x.sizes[1];
  s.height = x.sizes[2];
  s.width = x.sizes[3];
  std::copy_n(x.strides, 4, s.x_strides);
  constexpr int64_t kMost = 1 << 28;  // offsets within an image are 32 bits wide in the tables
  SADMM_CHECK(s.height < kMost && s.width < kMost && s.height * s.width < kMost, op, ": x got shape ", x.shape(),
              ", wanted fewer than 2^28 pixels");
  s.out_h = out_size(op, s.height, kernel_h, args.stride[0], args.padding[0], args.dilation[0]);
  s.out_w = out_size(op, s.width, kernel_w, args.stride[1], args.padding[1], args.dilation[1]);
  SADMM_CHECK(s.out_h < kMost && s.out_w < kMost && s.out_h * s.out_w < kMost, op, ": y would get ", s.out_h, " x ",
              s.out_w, " pixels, wanted fewer than 2^28");
  return s;
}

void conv2d_compact(const Conv2dShape& s, const float* x, const Packed& packed, float* y, Isa isa, Parallel& parallel) {
  if (s.batch == 0) return;
  const Plan& plan = kept_plan(s, packed, isa);
  const Planes& planes = plan.taps.planes.x;
  float* copy = plan.direct ? nullptr : scratch(planes.readable, Scratch::kCopy);
  for (int64_t image = 0; image < s.batch; image += plan.chunk) {
    const int64_t images = std::min(plan.chunk, s.batch - image);
    const float* from = x + image * s.x_strides[0];
    if (!plan.direct) {
      const int64_t macs = packed.header->weights * s.out_h * s.out_w * images;
      const int64_t tasks = macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
      copy_padded(plan, s, packed, from, images, copy, isa, parallel, std::min<int64_t>(tasks, packed.channels.size()));
      from = copy;
    }
    run_taps(plan.taps, packed, from, nullptr, y + image * plan.taps.planes.y.image_stride, images, parallel);
  }
}

std::vector<std::string> conv2d_kernels(const Conv2dShape& s, const Packed& packed, Isa isa) {
  return tap_kernels(make_plan(s, packed, isa).taps, packed);
}

}  // namespace structadmm
