// import, export, copy, scale_shift, multiply and flatten: one loop over four dimensions of strided operands.
#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"
#include "kernels/rows/rows.h"
#include "ops/split.h"
#include "ops/steps.h"
#include "simd/vec_scalar.h"

namespace structadmm {
namespace {

using kernels::RowOp;
using kernels::RowsArgs;
using kernels::RowsKernel;

constexpr int64_t kSerialElements = 1 << 15;
constexpr int64_t kLongestRow = 1 << 14;  // longer ones would leave threads without rows
constexpr int kChunk = 256;

// Where an operand lies: element (n, c, h, w) at offset + the sum of index * stride.
struct Place {
  Dtype dtype = Dtype::kF32;
  int64_t offset = 0;
  std::array<int64_t, 4> strides{};  // n, c, h, w
};

Place place(const Planes& p) {
  return {p.dtype, p.origin, {p.image_stride, p.channel_stride, p.pitch, 1}};
}

Place place(const char* op, const char* name, const TensorView& t) {
  SADMM_CHECK(t.dtype == Dtype::kF32 || t.dtype == Dtype::kBf16 || t.dtype == Dtype::kF16, op, ": ", name, " got ",
              dtype_name(t.dtype), ", wanted f32, bf16 or f16");
  SADMM_CHECK(t.dims == 2 || t.dims == 4, op, ": ", name, " got ", t.dims, " dimensions, wanted 2 or 4");
  Place p{t.dtype, 0, {}};
  for (int d = 0; d < t.dims; ++d) p.strides[d] = t.strides[d];
  return p;
}

void check_sizes(const char* op, const char* name, const TensorView& t, const Planes& p) {
  const int64_t height = t.dims == 4 ? t.sizes[2] : 1, width = t.dims == 4 ? t.sizes[3] : 1;
  SADMM_CHECK(t.sizes[1] == p.channels && height == p.height && width == p.width, op, ": ", name, " got shape ",
              t.shape(), ", wanted [N, ", p.channels, ", ", p.height, ", ", p.width, "]");
}

void check_sizes(const char* op, const char* name, const Planes& got, const Planes& p) {
  SADMM_CHECK(got.channels == p.channels && got.height == p.height && got.width == p.width, op, ": ", name,
              " got planes of [", got.channels, ", ", got.height, ", ", got.width, "], wanted [", p.channels, ", ",
              p.height, ", ", p.width, "]");
}

void check_dtype(const char* op, const char* name, Dtype dtype) {
  SADMM_CHECK(dtype == Dtype::kF32 || dtype == Dtype::kBf16, op, ": ", name, " got ", dtype_name(dtype),
              ", wanted f32 or bf16");
}

const char* moved(const char* base, Dtype dtype, int64_t elements) {
  return base + elements * dtype_size(dtype);
}

float value(const char* base, Dtype dtype, int64_t at) {
  const char* p = moved(base, dtype, at);
  if (dtype == Dtype::kF32) return *reinterpret_cast<const float*>(p);
  if (dtype == Dtype::kBf16) return scalar::to_float(*reinterpret_cast<const Bf16*>(p));
  return scalar::to_float(*reinterpret_cast<const F16*>(p));
}

void set_value(char* base, Dtype dtype, int64_t at, float v) {
  char* p = base + at * dtype_size(dtype);
  if (dtype == Dtype::kF32) return scalar::from_float(v, *reinterpret_cast<float*>(p));
  if (dtype == Dtype::kBf16) return scalar::from_float(v, *reinterpret_cast<Bf16*>(p));
  scalar::from_float(v, *reinterpret_cast<F16*>(p));
}

const char* op_name(RowOp op) {
  constexpr const char* names[] = {"copy", "add", "multiply", "gate", "affine", "affines"};
  return names[static_cast<int>(op)];
}

// What is to be computed, before the loop is chosen. b: residual, factor or gate.
struct Work {
  RowOp op = RowOp::kCopy;
  int64_t sizes[3] = {};  // channels, height, width
  Place x, b, y;
  std::vector<float> scale, shift;  // of kAffine
  Epilogue epilogue;
  std::vector<int64_t> channels;  // of kCopy: those that are wanted, ascending; empty: all
};

class ElementStep final : public Step {
 public:
  ElementStep(Work work, Isa isa) : w_(std::move(work)), kernels_(kernels::rows_kernels(isa)) {
    Operand x{w_.x.offset, {}}, b{w_.b.offset, {}}, y{w_.y.offset, {}}, s{0, {}};
    for (int i = 0; i < 3; ++i) {
      x.strides[i] = w_.x.strides[i + 1];
      b.strides[i] = w_.b.strides[i + 1];
      y.strides[i] = w_.y.strides[i + 1];
    }
    s.strides[0] = w_.scale.empty() ? 0 : 1;
    operands_ = {x, b, y, s};
    std::copy(w_.sizes, w_.sizes + 3, sizes_);
    const bool plain = w_.op == RowOp::kCopy && Epilogue{} == w_.epilogue;
    // Only rows of pixels can be left out: elsewhere each line that is read has all channels.
    const int inner = sizes_[2] > 1 ? 2 : 1;
    if (sizes_[inner] == 1 || X().strides[inner] != 1 || Y().strides[inner] != 1) w_.channels.clear();
    if (w_.channels.empty()) {
      collapse(0);
    } else {
      sizes_[0] = static_cast<int64_t>(w_.channels.size());
      collapse(1);
    }
    const int xi = kernels::dtype_index(w_.x.dtype), yi = kernels::dtype_index(w_.y.dtype);
    const bool rows = (sizes_[2] == 1 || (X().strides[2] == 1 && Y().strides[2] == 1)) && B().strides[2] <= 1;
    if (!rows && plain && w_.channels.empty() && sizes_[0] * sizes_[1] > 1) {
      // A dimension in which x is contiguous and another in which y is.
      for (int i = 0; i < 2; ++i) {
        if (X().strides[i] == 1 && Y().strides[2] == 1) plan_transpose(i, 2);
        if (X().strides[2] == 1 && Y().strides[i] == 1) plan_transpose(2, i);
        if (way_ != Way::kRows) break;
      }
    }
    if (way_ == Way::kTranspose) {
      kernel_ = kernels_.transpose[xi][yi];
    } else if (way_ == Way::kTriples) {
      kernel_ = kernels_.split_triples[xi][yi];
    } else {
      if (!rows) way_ = Way::kSlow;
      if (w_.op == RowOp::kMultiply && B().strides[2] == 0 && sizes_[2] > 1) w_.op = RowOp::kGate;
      if (w_.op == RowOp::kAffine && operands_[3].strides[2] == 1 && sizes_[2] > 1) w_.op = RowOp::kAffines;
      kernel_ = way_ == Way::kSlow            ? kernels_.rows[static_cast<int>(w_.op)][0][0]
                : plain && xi == yi && xi < 2 ? kernels_.move[xi]
                                              : kernels_.rows[static_cast<int>(w_.op)][xi][yi];
    }
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const auto* x = static_cast<const char*>(inputs[0]);
    const auto* b = inputs.size() > 1 ? static_cast<const char*>(inputs[1]) : x;
    auto* y = static_cast<char*>(output);
    const int64_t work = images * sizes_[0] * sizes_[1] * sizes_[2];
    if (work == 0) return;
    if (way_ == Way::kTranspose || way_ == Way::kTriples) {
      split(parallel, images * blocks(), work, kSerialElements,
            [&](int64_t begin, int64_t end) { run_blocks(x, y, begin, end); });
    } else {
      split(parallel, images * sizes_[0] * sizes_[1], work, kSerialElements,
            [&](int64_t begin, int64_t end) { run_rows(x, b, y, begin, end); });
    }
  }

  std::string kernel() const override {
    const std::string what = way_ == Way::kTranspose ? "transpose"
                             : way_ == Way::kTriples ? "split_triples"
                             : way_ == Way::kSlow    ? std::string("strided_") + op_name(w_.op)
                                                     : std::string("rows_") + op_name(w_.op);
    return what + "_" + dtype_name(w_.x.dtype) + "_" + dtype_name(w_.y.dtype) + "__" + kernels_.isa;
  }

 private:
  enum class Way { kRows, kTranspose, kTriples, kSlow };
  struct Operand {
    int64_t offset;
    int64_t strides[3];
  };

  const Operand& X() const { return operands_[0]; }
  const Operand& B() const { return operands_[1]; }
  const Operand& Y() const { return operands_[2]; }

  // Drops dimensions of size one and merges neighbours, so that the last is as long as it can be; those from `first`
  // on.
  void collapse(int first) {
    int n = first;
    for (int i = first; i < 3; ++i) {
      if (sizes_[i] == 1) continue;
      const auto merges = [&](const Operand& o) { return o.strides[n - 1] == o.strides[i] * sizes_[i]; };
      const bool merge = n > first && std::all_of(operands_.begin(), operands_.end(), merges) &&
                         sizes_[n - 1] * sizes_[i] <= kLongestRow;
      const int64_t size = merge ? sizes_[n - 1] * sizes_[i] : sizes_[i];
      if (!merge) ++n;
      sizes_[n - 1] = size;
      for (Operand& o : operands_) o.strides[n - 1] = o.strides[i];
    }
    for (int i = 2; i >= first; --i, --n) {
      sizes_[i] = n > first ? sizes_[n - 1] : 1;
      for (Operand& o : operands_) o.strides[i] = n > first ? o.strides[n - 1] : 0;
    }
  }

  // Rows of x along dimension xd, rows of y along yd.
  void plan_transpose(int xd, int yd) {
    way_ = Way::kTranspose;
    row_ = yd;
    col_ = xd;
    other_ = 3 - xd - yd;
    if (sizes_[xd] == 3 && X().strides[yd] == 3) way_ = Way::kTriples;
  }

  // A block of a transposition: so many rows of x, of one index of the other dimension.
  static constexpr int64_t kBlock = 64;
  int64_t row_blocks() const { return (sizes_[row_] + kBlock - 1) / kBlock; }
  int64_t blocks() const { return sizes_[other_] * row_blocks(); }

  void run_blocks(const char* x, char* y, int64_t begin, int64_t end) const {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t n = u / blocks(), o = u % blocks() / row_blocks(), r = u % row_blocks() * kBlock;
      RowsArgs a;
      a.x = moved(x, w_.x.dtype, X().offset + n * w_.x.strides[0] + o * X().strides[other_] + r * X().strides[row_]);
      a.y = const_cast<char*>(
          moved(y, w_.y.dtype, Y().offset + n * w_.y.strides[0] + o * Y().strides[other_] + r * Y().strides[row_]));
      a.rows = std::min(kBlock, sizes_[row_] - r);
      a.cols = sizes_[col_];
      a.x_stride = X().strides[row_];
      a.y_stride = Y().strides[col_];
      if (way_ == Way::kTriples) a.cols = a.rows;
      kernel_(a);
    }
  }

  int64_t channel(int64_t i) const { return w_.channels.empty() ? i : w_.channels[static_cast<size_t>(i)]; }

  void run_rows(const char* x, const char* b, char* y, int64_t begin, int64_t end) const {
    RowsArgs a;
    a.cols = sizes_[2];
    a.x_stride = X().strides[1];
    a.b_stride = B().strides[1];
    a.y_stride = Y().strides[1];
    a.scale_stride = operands_[3].strides[1];
    a.epilogue = w_.epilogue;
    const int64_t plane = begin / sizes_[1];
    int64_t n = plane / sizes_[0], i = plane % sizes_[0], j = begin % sizes_[1];
    for (int64_t u = begin; u < end; u += a.rows) {
      const auto at = [&](const Operand& o, int64_t image_stride) {
        return o.offset + n * image_stride + channel(i) * o.strides[0] + j * o.strides[1];
      };
      a.rows = std::min(sizes_[1] - j, end - u);
      if (!w_.scale.empty()) {
        a.scale = w_.scale.data() + at(operands_[3], 0);
        a.shift = w_.shift.data() + at(operands_[3], 0);
      }
      const int64_t xo = at(X(), w_.x.strides[0]), bo = at(B(), w_.b.strides[0]), yo = at(Y(), w_.y.strides[0]);
      if (way_ == Way::kSlow) {
        run_slow(a, x, b, y, xo, bo, yo);
      } else {
        a.x = moved(x, w_.x.dtype, xo);
        a.b = moved(b, w_.b.dtype, bo);
        a.y = const_cast<char*>(moved(y, w_.y.dtype, yo));
        kernel_(a);
      }
      j = 0;
      if (++i == sizes_[0]) i = 0, ++n;
    }
  }

  // Through buffers in which the rows are contiguous.
  void run_slow(const RowsArgs& rows, const char* x, const char* b, char* y, int64_t xo, int64_t bo, int64_t yo) const {
    float xs[kChunk], bs[kChunk], ys[kChunk], scales[kChunk], shifts[kChunk];
    const int64_t step = operands_[3].strides[2];
    for (int64_t r = 0; r < rows.rows; ++r) {
      for (int64_t i = 0; i < rows.cols; i += kChunk) {
        RowsArgs a = rows;
        a.rows = 1;
        a.cols = std::min<int64_t>(kChunk, rows.cols - i);
        for (int64_t k = 0; k < a.cols; ++k) {
          xs[k] = value(x, w_.x.dtype, xo + r * a.x_stride + (i + k) * X().strides[2]);
          bs[k] = w_.op == RowOp::kCopy ? 0 : value(b, w_.b.dtype, bo + r * a.b_stride + (i + k) * B().strides[2]);
          if (!a.scale) continue;
          scales[k] = rows.scale[r * a.scale_stride + (i + k) * step];
          shifts[k] = rows.shift[r * a.scale_stride + (i + k) * step];
        }
        a.x = xs, a.b = bs, a.y = ys;
        if (rows.scale) a.scale = scales, a.shift = shifts;
        kernel_(a);
        for (int64_t k = 0; k < a.cols; ++k) {
          set_value(y, w_.y.dtype, yo + r * a.y_stride + (i + k) * Y().strides[2], ys[k]);
        }
      }
    }
  }

  Work w_;
  const kernels::RowsKernels& kernels_;
  std::array<Operand, 4> operands_;  // x, b, y, scale and shift
  int64_t sizes_[3];
  Way way_ = Way::kRows;
  int row_ = 0, col_ = 0, other_ = 0;
  RowsKernel kernel_ = nullptr;
};

Work work(RowOp op, const Planes& sizes, Place x, Place y, const Epilogue& epilogue = {}) {
  return {.op = op,
          .sizes = {sizes.channels, sizes.height, sizes.width},
          .x = x,
          .b = {},
          .y = y,
          .scale = {},
          .shift = {},
          .epilogue = epilogue,
          .channels = {}};
}

}  // namespace

std::unique_ptr<Step> import_step(const TensorView& x, const Planes& y, Isa isa, const std::vector<int64_t>& channels) {
  constexpr auto op = "import";
  const Place from = place(op, "x", x), to = place(y);
  check_sizes(op, "x", x, y);
  check_dtype(op, "y", y.dtype);
  for (const int64_t c : channels) {
    SADMM_CHECK(c >= 0 && c < y.channels, op, ": channels got ", c, ", wanted 0 to ", y.channels - 1);
  }
  Work w = work(RowOp::kCopy, y, from, to);
  w.channels = channels;
  return std::make_unique<ElementStep>(std::move(w), isa);
}

std::unique_ptr<Step> export_step(const Planes& x, const TensorView& y, int64_t images, Isa isa) {
  constexpr auto op = "export";
  const Place to = place(op, "y", y);
  check_sizes(op, "y", y, x);
  SADMM_CHECK(y.sizes[0] >= images, op, ": y got ", y.sizes[0], " images, wanted ", images);
  check_dtype(op, "x", x.dtype);
  return std::make_unique<ElementStep>(work(RowOp::kCopy, x, place(x), to), isa);
}

std::unique_ptr<Step> copy_step(const Planes& x, const Planes& y, const Planes* residual, const Epilogue& epilogue,
                                int64_t, Isa isa) {
  constexpr auto op = "copy";
  check_sizes(op, "x", x, y);
  check_dtype(op, "x", x.dtype);
  check_dtype(op, "y", y.dtype);
  SADMM_CHECK(epilogue.residual == (residual != nullptr), op, ": residual got ", residual ? "planes" : "none",
              ", wanted what the epilogue says");
  Work w = work(residual ? RowOp::kAdd : RowOp::kCopy, y, place(x), place(y), epilogue);
  if (residual) {
    check_sizes(op, "residual", *residual, y);
    SADMM_CHECK(residual->dtype == x.dtype, op, ": residual got ", dtype_name(residual->dtype), ", wanted that of x, ",
                dtype_name(x.dtype));
    w.b = place(*residual);
  }
  return std::make_unique<ElementStep>(std::move(w), isa);
}

std::unique_ptr<Step> scale_shift_step(const Planes& x, const Planes& y, std::vector<float> scale,
                                       std::vector<float> shift, const Epilogue& epilogue, int64_t, Isa isa) {
  constexpr auto op = "scale_shift";
  check_sizes(op, "x", x, y);
  check_dtype(op, "x", x.dtype);
  check_dtype(op, "y", y.dtype);
  const auto channels = static_cast<size_t>(x.channels);
  SADMM_CHECK(scale.size() == channels && shift.size() == channels, op, ": scale and shift got ", scale.size(), " and ",
              shift.size(), " values, wanted ", channels);
  SADMM_CHECK(!epilogue.residual, op, ": epilogue got a residual, wanted none");
  Work w = work(RowOp::kAffine, y, place(x), place(y), epilogue);
  w.scale = std::move(scale);
  w.shift = std::move(shift);
  return std::make_unique<ElementStep>(std::move(w), isa);
}

std::unique_ptr<Step> multiply_step(const Planes& x, const Planes& gate, const Planes& y, const Epilogue& epilogue,
                                    int64_t, Isa isa) {
  constexpr auto op = "multiply";
  check_sizes(op, "x", x, y);
  check_dtype(op, "x", x.dtype);
  check_dtype(op, "y", y.dtype);
  SADMM_CHECK(gate.dtype == x.dtype, op, ": gate got ", dtype_name(gate.dtype), ", wanted that of x, ",
              dtype_name(x.dtype));
  SADMM_CHECK(!epilogue.residual, op, ": epilogue got a residual, wanted none");
  Work w = work(RowOp::kMultiply, y, place(x), place(y), epilogue);
  w.b = place(gate);
  if (gate.height == 1 && gate.width == 1 && gate.channels == x.channels) {
    w.b.strides[2] = w.b.strides[3] = 0;
  } else {
    check_sizes(op, "gate", gate, x);
  }
  return std::make_unique<ElementStep>(std::move(w), isa);
}

std::unique_ptr<Step> flatten_step(const Planes& x, const Planes& y, int64_t, Isa isa) {
  constexpr auto op = "flatten";
  check_dtype(op, "x", x.dtype);
  check_dtype(op, "y", y.dtype);
  SADMM_CHECK(y.height == 1 && y.width == 1 && y.channel_stride == 1, op,
              ": y got planes with a height, width or stride, wanted rows of features");
  SADMM_CHECK(y.channels == x.channels * x.height * x.width, op, ": y got ", y.channels, " features, wanted ",
              x.channels * x.height * x.width);
  const Place to{y.dtype, y.origin, {y.image_stride, x.height * x.width, x.width, 1}};
  return std::make_unique<ElementStep>(work(RowOp::kCopy, x, place(x), to), isa);
}

}  // namespace structadmm
