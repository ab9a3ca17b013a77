// Pooling over planes: windows worked out once, a task per range of planes.
#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/pool/pool.h"
#include "ops/split.h"
#include "ops/steps.h"

namespace structadmm {
namespace {

using kernels::PoolWindow;

constexpr int64_t kSerialElements = 1 << 15;

float* row_buffer(int64_t size) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

template <class T>
auto* moved(T* base, Dtype dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<T*>(static_cast<Byte*>(base) + elements * dtype_size(dtype));
}

void check_planes(const char* op, const Planes& x, const Planes& y) {
  SADMM_CHECK(x.dtype == Dtype::kF32 || x.dtype == Dtype::kBf16, op, ": x got ", dtype_name(x.dtype),
              ", wanted f32 or bf16");
  SADMM_CHECK(y.dtype == x.dtype, op, ": y got ", dtype_name(y.dtype), ", wanted that of x, ", dtype_name(x.dtype));
  SADMM_CHECK(y.channels == x.channels, op, ": y got ", y.channels, " channels, wanted those of x, ", x.channels);
  SADMM_CHECK(x.height >= 1 && x.width >= 1 && y.height >= 1 && y.width >= 1, op, ": planes got ", x.height, " x ",
              x.width, " to ", y.height, " x ", y.width, ", wanted sizes of at least one");
}

// The windows along one axis, and by what a mean over them is divided.
struct Axis {
  std::vector<PoolWindow> windows;
  std::vector<float> divisors;

  void add(int64_t first, int64_t count, int64_t divisor) {
    windows.push_back({static_cast<int32_t>(first), static_cast<int32_t>(count)});
    divisors.push_back(static_cast<float>(divisor));
  }
};

class WindowStep final : public Step {
 public:
  WindowStep(const char* name, const Planes& x, const Planes& y, bool max, kernels::PoolArgs args, Axis rows,
             Axis columns, Isa isa)
      : name_(name),
        x_(x),
        y_(y),
        args_(args),
        rows_(std::move(rows)),
        columns_(std::move(columns)),
        kernels_(kernels::pool_kernels(isa)),
        kernel_(kernels_.windows[max ? 0 : 1][x.dtype == Dtype::kBf16]) {
    args_.x_pitch = x.pitch;
    args_.y_pitch = y.pitch;
    args_.width = x.width;
    args_.out_height = y.height;
    args_.out_width = y.width;
    args_.rows = rows_.windows.data();
    args_.columns = columns_.windows.data();
    args_.row_divisors = rows_.divisors.data();
    args_.column_divisors = columns_.divisors.data();
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const int64_t units = images * x_.channels, work = units * x_.height * x_.width;
    split(parallel, units, work, kSerialElements, [&](int64_t begin, int64_t end) {
      kernels::PoolArgs a = args_;
      a.buffer = row_buffer(a.buffer_size);
      for (int64_t u = begin; u < end; ++u) {
        a.x = moved(inputs[0], x_.dtype, x_.at(u % images, u / images, 0, 0));
        a.y = moved(output, y_.dtype, y_.at(u % images, u / images, 0, 0));
        kernel_(a);
      }
    });
  }

  std::string kernel() const override { return std::string(name_) + "_" + dtype_name(x_.dtype) + "__" + kernels_.isa; }

 private:
  const char* name_;
  Planes x_, y_;
  kernels::PoolArgs args_;
  Axis rows_, columns_;
  const kernels::PoolKernels& kernels_;
  void (*kernel_)(const kernels::PoolArgs&);
};

class PlaneStep final : public Step {
 public:
  PlaneStep(const Planes& x, const Planes& y, bool max, Isa isa)
      : x_(x),
        y_(y),
        max_(max),
        kernels_(kernels::pool_kernels(isa)),
        kernel_(kernels_.planes[max ? 0 : 1][x.dtype == Dtype::kBf16]) {}

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const int64_t units = images * x_.channels, work = units * x_.height * x_.width;
    split(parallel, units, work, kSerialElements, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end;) {
        const int64_t n = u / x_.channels, c = u % x_.channels, channels = std::min(x_.channels - c, end - u);
        kernel_({.x = moved(inputs[0], x_.dtype, x_.at(n, c, 0, 0)),
                 .y = moved(output, y_.dtype, y_.at(n, c, 0, 0)),
                 .channels = channels,
                 .channel_stride = x_.channel_stride,
                 .y_stride = y_.channel_stride,
                 .height = x_.height,
                 .width = x_.width,
                 .pitch = x_.pitch});
        u += channels;
      }
    });
  }

  std::string kernel() const override {
    return std::string("pool_planes_") + (max_ ? "max_" : "mean_") + dtype_name(x_.dtype) + "__" + kernels_.isa;
  }

 private:
  Planes x_, y_;
  bool max_;
  const kernels::PoolKernels& kernels_;
  void (*kernel_)(const kernels::PoolPlanesArgs&);
};

// What is outside left out. For a mean torch counts a window up to the padding behind the input, but not the rest of it
// that ceil_mode lets stick out.
Axis windows(const Pool& p, int axis, int64_t in, int64_t out) {
  Axis all;
  for (int64_t o = 0; o < out; ++o) {
    const int64_t start = o * p.stride[axis] - p.padding[axis], step = p.dilation[axis];
    const int64_t skipped = start < 0 ? (-start + step - 1) / step : 0;
    const int64_t first = start + skipped * step;
    const int64_t inside = first < in ? (in - first + step - 1) / step : 0;
    const int64_t count = std::clamp<int64_t>(p.kernel[axis] - skipped, 0, inside);
    const int64_t padded = std::min(start + p.kernel[axis], in + p.padding[axis]) - start;
    const int64_t divisor = p.divisor_override    ? (axis ? 1 : p.divisor_override)
                            : p.count_include_pad ? padded
                                                  : std::max<int64_t>(count, 1);
    all.add(count ? first : 0, count, divisor);
  }
  return all;
}

}  // namespace

std::unique_ptr<Step> pool_step(const Planes& x, const Planes& y, const Pool& pool, int64_t, Isa isa) {
  const char* op = pool.max ? "max_pool" : "avg_pool";
  check_planes(op, x, y);
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(pool.kernel[i] >= 1 && pool.stride[i] >= 1 && pool.padding[i] >= 0 && pool.dilation[i] >= 1, op,
                ": kernel, stride, padding and dilation got ", pool.kernel[i], ", ", pool.stride[i], ", ",
                pool.padding[i], " and ", pool.dilation[i], ", wanted positive ones, a padding of at least 0");
    SADMM_CHECK(pool.max || pool.dilation[i] == 1, op, ": dilation got ", pool.dilation[i], ", wanted 1");
    SADMM_CHECK(pool.padding[i] * 2 <= pool.kernel[i], op, ": padding got ", pool.padding[i],
                ", wanted at most half of the kernel, ", pool.kernel[i]);
  }
  auto rows = windows(pool, 0, x.height, y.height), columns = windows(pool, 1, x.width, y.width);
  kernels::PoolArgs a{};
  a.row_step = pool.dilation[0];
  a.column_stride = pool.stride[1];
  a.column_lead = pool.padding[1];
  a.column_step = pool.dilation[1];
  a.kernel_columns = pool.kernel[1];
  a.kernel_rows = pool.kernel[0];
  a.buffer_size =
      kernels::pool_buffer(x.width, y.width, a.column_stride, a.column_lead, (a.kernel_columns - 1) * a.column_step);
  return std::make_unique<WindowStep>(op, x, y, pool.max, a, std::move(rows), std::move(columns), isa);
}

std::unique_ptr<Step> adaptive_pool_step(const Planes& x, const Planes& y, bool max, int64_t images, Isa isa) {
  const char* op = max ? "adaptive_max_pool" : "adaptive_avg_pool";
  check_planes(op, x, y);
  if (y.height == x.height && y.width == x.width) return copy_step(x, y, nullptr, {}, images, isa);
  if (y.height == 1 && y.width == 1) return std::make_unique<PlaneStep>(x, y, max, isa);
  const auto parts = [](int64_t in, int64_t out) {
    Axis all;
    for (int64_t o = 0; o < out; ++o) {
      const int64_t first = o * in / out, last = ((o + 1) * in + out - 1) / out;
      all.add(first, last - first, last - first);
    }
    return all;
  };
  kernels::PoolArgs a{};
  a.row_step = 1;
  a.buffer_size = kernels::pool_buffer(x.width, 0, 1, 0, 0);
  return std::make_unique<WindowStep>(op, x, y, max, a, parts(x.height, y.height), parts(x.width, y.width), isa);
}

}  // namespace structadmm
