#include "ops/group_project.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "base/div_up.h"
#include "base/isa.h"
#include "kernels/admm_update/admm_update.h"
#include "kernels/group_sumsq/group_sumsq.h"
#include "kernels/topk_keep/topk_keep.h"

namespace structadmm {
namespace {

// Below this many weights an op takes less time than waking a second thread.
constexpr int64_t kSerialBelow = 32 * 1024;
// Weights in a tile: its five sums are folded once, and there are enough tiles to share out.
constexpr int64_t kTile = 16 * 1024;
// Weights in a gathered tile: four operands of it fit the stack and the first-level cache.
constexpr int64_t kGathered = 2 * 1024;
// Columns whose sums stay in the first-level cache while rows stream past, in runs as long as possible.
constexpr int64_t kColumns = 4 * 1024;
// Fewer columns than this (four cache lines) a run is too short for the prefetcher.
constexpr int64_t kMinColumns = 64;

Parallel& threads_for(int64_t weights, Parallel& parallel) {
  static Serial serial;
  return weights < kSerialBelow ? serial : parallel;
}

// Where a tile of an operand is: in place, or in a buffer it was gathered to.
struct Piece {
  char* data = nullptr;
  int64_t stride = 0;  // elements

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

template <class T, bool kGather>
void move_rows(char* tensor, int64_t row_stride, const int64_t* offset, char* buffer, int64_t rows, int64_t cols) {
  T* there = reinterpret_cast<T*>(tensor);
  T* here = reinterpret_cast<T*>(buffer);
  for (int64_t r = 0; r < rows; ++r, there += row_stride, here += cols) {
    for (int64_t c = 0; c < cols; ++c) {
      if constexpr (kGather) {
        here[c] = there[offset[c]];
      } else {
        there[offset[c]] = here[c];
      }
    }
  }
}

// One of w, z, u, g, mask, as rows of positions in the op's memory order.
class Operand {
 public:
  Operand() = default;
  Operand(const TensorView* t, Order order) {
    if (!t) return;
    rows_ = make_rows(*t);
    size_ = dtype_size(rows_.dtype);
    if (!rows_.dense(order)) offset_ = make_offsets(*t, order);
  }

  bool present() const { return rows_.data != nullptr; }
  bool gathered() const { return !offset_.empty(); }
  bool flat(int64_t row) const { return !present() || (!gathered() && rows_.row_stride == row); }

  // Rows [filter, filter + rows), positions [m, m + cols). The buffer has room for kGathered elements.
  Piece load(int64_t filter, int64_t m, int64_t rows, int64_t cols, char* buffer) const {
    if (!present()) return {};
    if (!gathered()) return {rows_.data + (filter * rows_.row_stride + m) * size_, rows_.row_stride};
    move<true>(filter, m, rows, cols, buffer);
    return {buffer, cols};
  }
  void save(int64_t filter, int64_t m, int64_t rows, int64_t cols, char* buffer) const {
    if (gathered()) move<false>(filter, m, rows, cols, buffer);
  }

 private:
  template <bool kGather>
  void move(int64_t filter, int64_t m, int64_t rows, int64_t cols, char* buffer) const {
    char* tensor = rows_.data + filter * rows_.row_stride * size_;
    const int64_t* offset = offset_.data() + m;
    switch (size_) {
      case 1:
        move_rows<uint8_t, kGather>(tensor, rows_.row_stride, offset, buffer, rows, cols);
        break;
      case 2:
        move_rows<uint16_t, kGather>(tensor, rows_.row_stride, offset, buffer, rows, cols);
        break;
      default:
        move_rows<uint32_t, kGather>(tensor, rows_.row_stride, offset, buffer, rows, cols);
    }
  }

  Rows rows_;
  int64_t size_ = 0;
  std::vector<int64_t> offset_;
};

struct Buffer {
  alignas(64) char data[kGathered * sizeof(float)];
};

// The order in which all operands are dense; failing that, the one in which w is, and the others are gathered.
Order common_order(const TensorView& w, std::initializer_list<const TensorView*> others) {
  const Rows rows = make_rows(w);
  bool logical = rows.logical, channels_last = rows.channels_last;
  for (const TensorView* t : others) {
    if (!t) continue;
    const Rows r = make_rows(*t);
    logical = logical && r.logical;
    channels_last = channels_last && r.channels_last;
  }
  if (logical) return Order::kLogical;
  if (channels_last) return Order::kChannelsLast;
  return rows.logical || !rows.channels_last ? Order::kLogical : Order::kChannelsLast;
}

// Steps through positions in memory order, giving j.
class LogicalIndex {
 public:
  LogicalIndex(const GroupView& view, Order order, int64_t m)
      : channels_(order == Order::kLogical ? 0 : view.channels), taps_(view.taps) {
    c_ = channels_ ? m % channels_ : 0;
    j_ = logical_index(view, order, m);
  }
  int64_t operator*() const { return j_; }
  LogicalIndex& operator++() {
    if (!channels_) {
      ++j_;
    } else if (++c_ < channels_) {
      j_ += taps_;
    } else {
      c_ = 0;
      j_ -= (channels_ - 1) * taps_ - 1;
    }
    return *this;
  }

 private:
  int64_t channels_, taps_, c_, j_;
};

struct Operands {
  Order order;
  Operand w, z, u, mask;
  Dtype dtype;
  bool gathered;

  Operands(const TensorView& wt, const TensorView* zt, const TensorView* ut, const TensorView* maskt)
      : order(common_order(wt, {zt, ut, maskt})),
        w(&wt, order),
        z(zt, order),
        u(ut, order),
        mask(maskt, order),
        dtype(wt.dtype),
        gathered(w.gathered() || z.gathered() || u.gathered() || mask.gathered()) {}
};

void sum_rows(const GroupView& view, const Operands& in, float* scores, Parallel& parallel) {
  const auto& kernel = select_group_sumsq(current_isa(), in.dtype);
  const int64_t per_task = std::max<int64_t>(1, kTile / view.row);
  const int64_t piece = in.gathered ? kGathered : view.row;
  parallel.run(div_up(view.filters, per_task), [&](int64_t task) {
    Buffer w, u, mask;
    const int64_t end = std::min(view.filters, (task + 1) * per_task);
    for (int64_t o = task * per_task; o < end; ++o) {
      float lanes[32] = {};
      for (int64_t m = 0; m < view.row; m += piece) {
        const int64_t n = std::min(piece, view.row - m);
        kernel.row({in.w.load(o, m, 1, n, w.data).data, in.u.load(o, m, 1, n, u.data).as<float>(),
                    in.mask.load(o, m, 1, n, mask.data).as<uint8_t>(), n, lanes});
      }
      scores[o] = fold_lanes(lanes);
    }
  });
}

// The sums of the cells of every band, at band * N + j, or + m (memory order) if `permute` is false.
void sum_cells(const GroupView& view, const Operands& in, bool permute, float* cells, Parallel& parallel) {
  const auto& kernel = select_group_sumsq(current_isa(), in.dtype);
  permute = permute && in.order != Order::kLogical;
  const int64_t bands_per_task = std::max<int64_t>(1, kTile / (view.band_filters * view.row));
  const int64_t band_tasks = div_up(view.bands, bands_per_task);
  int64_t col_tasks = std::max(div_up(view.row, kColumns), div_up(parallel.threads(), band_tasks));
  col_tasks = std::min(col_tasks, std::max<int64_t>(1, view.row / kMinColumns));
  const int64_t cols_per_task = div_up(div_up(view.row, col_tasks), 16) * 16;
  col_tasks = div_up(view.row, cols_per_task);

  parallel.run(band_tasks * col_tasks, [&](int64_t task) {
    const int64_t m0 = task % col_tasks * cols_per_task;
    const int64_t cols = std::min(cols_per_task, view.row - m0);
    const int64_t band_end = std::min(view.bands, (task / col_tasks + 1) * bands_per_task);
    alignas(64) float local[kColumns + 16];
    Buffer w, u, mask;
    for (int64_t band = task / col_tasks * bands_per_task; band < band_end; ++band) {
      const int64_t begin = view.band_begin(band), end = view.band_end(band);
      float* out = permute ? local : cells + band * view.row + m0;
      const int64_t part = in.gathered ? std::min<int64_t>(cols, 256) : cols;
      const int64_t step = in.gathered ? kGathered / part : end - begin;
      for (int64_t c = 0; c < cols; c += part) {
        const int64_t n = std::min(part, cols - c);
        for (int64_t o = begin; o < end; o += step) {
          const int64_t rows = std::min(step, end - o);
          const Piece pw = in.w.load(o, m0 + c, rows, n, w.data);
          const Piece pu = in.u.load(o, m0 + c, rows, n, u.data);
          const Piece pm = in.mask.load(o, m0 + c, rows, n, mask.data);
          kernel.columns({pw.data, pu.as<float>(), pm.as<uint8_t>(), pw.stride, pu.stride, pm.stride, rows, n,
                          o != begin, out + c});
        }
      }
      if (permute) {
        LogicalIndex j(view, in.order, m0);
        for (int64_t c = 0; c < cols; ++c, ++j) cells[band * view.row + *j] = local[c];
      }
    }
  });
}

std::unique_ptr<float[]> floats(int64_t n) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]);
}

void scores_of(const GroupView& view, const Operands& in, float* scores, Parallel& parallel) {
  if (view.structure == Structure::kFilter) return sum_rows(view, in, scores, parallel);
  if (view.structure != Structure::kChannel) return sum_cells(view, in, true, scores, parallel);
  const auto cells = floats(view.bands * view.row);
  sum_cells(view, in, false, cells.get(), parallel);
  const bool logical = in.order == Order::kLogical;
  const int64_t channel_step = logical ? view.taps : 1, tap_step = logical ? 1 : view.channels;
  for (int64_t i = 0; i < view.groups; ++i) {
    const float* cell = cells.get() + i / view.channels * view.row + i % view.channels * channel_step;
    float sum = cell[0];
    for (int64_t t = 1; t < view.taps; ++t) sum += cell[t * tap_step];
    scores[i] = sum;
  }
}

void checked_topk(const char* op, const char* what, const float* scores, int64_t n, int64_t k, uint8_t* keep) {
  const int64_t bad = topk_keep(scores, n, k, keep);
  SADMM_CHECK(bad < 0, op, ": ", what, " got ", scores[bad], " in group ", bad, ", wanted finite values");
}

// For every band and position in memory order, whether it is kept; `keep` itself where it is already that.
class KeptCells {
 public:
  KeptCells(const GroupView& view, Order order, const uint8_t* keep, Parallel& parallel) : cells_(keep) {
    const bool channel = view.structure == Structure::kChannel;
    if (view.structure == Structure::kFilter || (order == Order::kLogical && !channel)) return;
    own_.reset(new uint8_t[static_cast<size_t>(view.bands * view.row)]);
    cells_ = own_.get();
    const int64_t per_task = std::max<int64_t>(1, kTile / view.row);
    parallel.run(div_up(view.bands, per_task), [&](int64_t task) {
      const int64_t end = std::min(view.bands, (task + 1) * per_task);
      for (int64_t band = task * per_task; band < end; ++band) {
        uint8_t* out = own_.get() + band * view.row;
        const uint8_t* in = keep + band * (channel ? view.channels : view.row);
        LogicalIndex j(view, order, 0);
        for (int64_t m = 0; m < view.row; ++m, ++j) out[m] = in[channel ? *j / view.taps : *j];
      }
    });
  }
  const uint8_t* at(int64_t band, int64_t m, int64_t row) const { return cells_ + band * row + m; }

 private:
  const uint8_t* cells_;
  std::unique_ptr<uint8_t[]> own_;
};

// A run of rows that share their keep bytes (stride 0), or have them one row after the other.
struct KeepRun {
  const uint8_t* keep;
  int64_t stride, rows;
};

// keep_of(filter, end, m): the run that begins at this filter, and ends at `end` or before.
template <class KeepOf>
void update_tiles(int64_t filters, int64_t row, const Operands& in, const KeepOf& keep_of, double total[5],
                  Parallel& parallel) {
  const auto& kernel = select_admm_update(current_isa(), in.dtype);
  const int64_t area = in.gathered ? kGathered : kTile;
  const int64_t cols_per_tile = std::min(row, area);
  const int64_t rows_per_tile = std::max<int64_t>(1, area / cols_per_tile);
  const int64_t col_tiles = div_up(row, cols_per_tile);
  const int64_t tiles = div_up(filters, rows_per_tile) * col_tiles;
  std::vector<double> sums(static_cast<size_t>(tiles * 5));

  parallel.run(tiles, [&](int64_t tile) {
    const int64_t m = tile % col_tiles * cols_per_tile;
    const int64_t cols = std::min(cols_per_tile, row - m);
    const int64_t end = std::min(filters, (tile / col_tiles + 1) * rows_per_tile);
    double lanes[5][8] = {};
    Buffer w, z, u, mask;
    for (int64_t o = tile / col_tiles * rows_per_tile; o < end;) {
      const KeepRun run = keep_of(o, end, m);
      const Piece pw = in.w.load(o, m, run.rows, cols, w.data);
      const Piece pz = in.z.load(o, m, run.rows, cols, z.data);
      const Piece pu = in.u.load(o, m, run.rows, cols, u.data);
      const Piece pm = in.mask.load(o, m, run.rows, cols, mask.data);
      // A known mask alone takes the place of keep.
      const uint8_t* keep = run.keep ? run.keep : pm.as<uint8_t>();
      kernel.update({pw.data, pz.as<float>(), pu.as<float>(), keep, run.keep ? pm.as<uint8_t>() : nullptr, pw.stride,
                     pz.stride, pu.stride, run.keep ? run.stride : pm.stride, pm.stride, run.rows, cols, lanes});
      in.z.save(o, m, run.rows, cols, z.data);
      in.u.save(o, m, run.rows, cols, u.data);
      o += run.rows;
    }
    for (int i = 0; i < 5; ++i) {
      for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) lanes[i][j] += lanes[i][j + half];
      }
      sums[static_cast<size_t>(tile * 5 + i)] = lanes[i][0];
    }
  });
  for (int i = 0; i < 5; ++i) total[i] = 0;
  for (size_t t = 0; t < sums.size(); ++t) total[t % 5] += sums[t];
}

struct Extent {
  const char* begin;
  const char* end;
  bool whole;  // no gaps
};

Extent extent_of(const TensorView& t) {
  int64_t low = 0, high = 1;
  for (int d = 0; d < t.dims; ++d) {
    const int64_t reach = (t.sizes[d] - 1) * t.strides[d];
    (reach < 0 ? low : high) += reach;
  }
  const int64_t size = dtype_size(t.dtype);
  const char* data = static_cast<const char*>(t.data);
  return {data + low * size, data + high * size, high - low == t.numel()};
}

// A tensor that is written may not share memory with another. Interleaved views are given the benefit of the doubt.
void check_apart(const char* op, const char* name, const TensorView& t, const char* other_name,
                 const TensorView* other) {
  if (!other) return;
  const Extent a = extent_of(t), b = extent_of(*other);
  const bool shared = t.data == other->data || (a.whole && b.whole && a.begin < b.end && b.begin < a.end);
  SADMM_CHECK(!shared, op, ": ", name, " got memory that it shares with ", other_name, ", wanted its own");
}

void check_written(const char* op, const char* name, const TensorView& t) {
  for (int d = 0; d < t.dims; ++d) {
    SADMM_CHECK(t.sizes[d] == 1 || t.strides[d] != 0, op, ": ", name,
                " got an expanded tensor, wanted one element of memory per weight");
  }
}

void check_like(const char* op, const char* name, const TensorView& t, Dtype dtype, const TensorView& w) {
  SADMM_CHECK(t.dtype == dtype, op, ": ", name, " got ", dtype_name(t.dtype), ", wanted ", dtype_name(dtype));
  SADMM_CHECK(t.same_shape(w), op, ": ", name, " got shape ", t.shape(), ", wanted w's ", w.shape());
  SADMM_CHECK(t.device == w.device && t.device_index == w.device_index, op, ": ", name,
              " got another device than w's, wanted the same");
}

void check_weight(const char* op, const TensorView& w) {
  SADMM_CHECK(w.dtype == Dtype::kF32 || w.dtype == Dtype::kBf16 || w.dtype == Dtype::kF16, op, ": w got ",
              dtype_name(w.dtype), ", wanted f32, bf16 or f16");
  SADMM_CHECK(w.dims >= 1 && w.numel() > 0, op, ": w got shape ", w.shape(), ", wanted a weight with elements");
}

}  // namespace

void check_operands(const char* op, const TensorView& w, const TensorView* z, const TensorView* u,
                    const TensorView* mask) {
  check_weight(op, w);
  if (u) check_like(op, "u", *u, Dtype::kF32, w);
  if (mask) check_like(op, "mask", *mask, Dtype::kBool, w);
  if (!z) return;
  check_like(op, "z", *z, Dtype::kF32, w);
  check_written(op, "z", *z);
  check_written(op, "u", *u);
  check_apart(op, "z", *z, "w", &w);
  check_apart(op, "z", *z, "u", u);
  check_apart(op, "z", *z, "mask", mask);
  check_apart(op, "u", *u, "w", &w);
  check_apart(op, "u", *u, "mask", mask);
}

void check_k(const char* op, int64_t k, int64_t groups) {
  SADMM_CHECK(0 <= k && k <= groups, op, ": k got ", k, ", wanted 0 to ", groups);
}

void check_penalty(const std::vector<PenaltyLayer>& layers) {
  constexpr const char* kOp = "add_penalty_grad_";
  for (size_t i = 0; i < layers.size(); ++i) {
    const PenaltyLayer& l = layers[i];
    const std::string op = std::string(kOp) + ": layer " + std::to_string(i);
    check_weight(op.c_str(), l.w);
    check_like(op.c_str(), "grad", l.g, l.w.dtype, l.w);
    check_like(op.c_str(), "z", l.z, Dtype::kF32, l.w);
    check_like(op.c_str(), "u", l.u, Dtype::kF32, l.w);
    check_written(op.c_str(), "grad", l.g);
    check_apart(op.c_str(), "grad", l.g, "w", &l.w);
    check_apart(op.c_str(), "grad", l.g, "z", &l.z);
    check_apart(op.c_str(), "grad", l.g, "u", &l.u);
    SADMM_CHECK(std::isfinite(l.rho), op, ": rho got ", l.rho, ", wanted a finite number");
  }
}

void group_sumsq(const GroupView& view, const TensorView& w, const TensorView* u, const TensorView* mask, float* scores,
                 Parallel& parallel) {
  check_operands("group_sumsq", w, nullptr, u, mask);
  scores_of(view, Operands(w, nullptr, u, mask), scores, threads_for(w.numel(), parallel));
}

void topk_keep(const TensorView& scores, int64_t k, uint8_t* keep) {
  constexpr const char* kOp = "topk_keep";
  SADMM_CHECK(scores.dtype == Dtype::kF32, kOp, ": scores got ", dtype_name(scores.dtype), ", wanted f32");
  SADMM_CHECK(scores.dims == 1, kOp, ": scores got shape ", scores.shape(), ", wanted one dimension");
  const int64_t n = scores.sizes[0];
  check_k(kOp, k, n);
  const float* data = static_cast<const float*>(scores.data);
  std::unique_ptr<float[]> dense;
  if (scores.strides[0] != 1) {
    dense = floats(n);
    for (int64_t i = 0; i < n; ++i) dense[static_cast<size_t>(i)] = data[i * scores.strides[0]];
    data = dense.get();
  }
  checked_topk(kOp, "scores", data, n, k, keep);
}

void project_update_(const GroupView& view, const TensorView& w, const TensorView& z, const TensorView& u, int64_t k,
                     const TensorView* mask, uint8_t* keep, double sums[5], Parallel& all_threads) {
  constexpr const char* kOp = "project_update_";
  check_operands(kOp, w, &z, &u, mask);
  check_k(kOp, k, view.groups);
  Parallel& parallel = threads_for(w.numel(), all_threads);
  const Operands in(w, &z, &u, mask);
  {
    const auto scores = floats(view.groups);
    scores_of(view, in, scores.get(), parallel);
    checked_topk(kOp, "the norm of w + u", scores.get(), view.groups, k, keep);
  }

  if (view.structure == Structure::kFilter) {
    const std::vector<uint8_t> on(static_cast<size_t>(view.row), 1), off(static_cast<size_t>(view.row), 0);
    const auto keep_of = [&](int64_t o, int64_t end, int64_t) {
      int64_t rows = 1;
      while (o + rows < end && keep[o + rows] == keep[o]) ++rows;
      return KeepRun{(keep[o] ? on : off).data(), 0, rows};
    };
    return update_tiles(view.filters, view.row, in, keep_of, sums, parallel);
  }
  const KeptCells cells(view, in.order, keep, parallel);
  const auto keep_of = [&](int64_t o, int64_t end, int64_t m) {
    const int64_t band = view.band_of(o);
    const uint8_t* at = cells.at(band, m, view.row);
    if (view.band_filters == 1) return KeepRun{at, view.row, end - o};
    return KeepRun{at, 0, std::min(end, view.band_end(band)) - o};
  };
  update_tiles(view.filters, view.row, in, keep_of, sums, parallel);
}

void masked_update_(const TensorView& w, const TensorView& z, const TensorView& u, const TensorView& mask,
                    double sums[5], Parallel& parallel) {
  check_operands("masked_update_", w, &z, &u, &mask);
  const Operands in(w, &z, &u, &mask);
  const auto keep_of = [](int64_t o, int64_t end, int64_t) { return KeepRun{nullptr, 0, end - o}; };
  update_tiles(w.sizes[0], w.numel() / w.sizes[0], in, keep_of, sums, threads_for(w.numel(), parallel));
}

void add_penalty_grad_(const std::vector<PenaltyLayer>& layers, Parallel& parallel) {
  check_penalty(layers);
  struct Plan {
    const AdmmUpdateKernel* kernel;
    Operand g, w, z, u;
    float rho;
    int64_t rows, cols, cols_per_tile, rows_per_tile, col_tiles, end;  // end: of its tiles, counted over all layers
  };
  std::vector<Plan> plans;
  plans.reserve(layers.size());
  int64_t tiles = 0, weights = 0;
  for (const PenaltyLayer& l : layers) {
    const Order order = common_order(l.w, {&l.g, &l.z, &l.u});
    Plan p{&select_admm_update(current_isa(), l.w.dtype),
           Operand(&l.g, order),
           Operand(&l.w, order),
           Operand(&l.z, order),
           Operand(&l.u, order),
           static_cast<float>(l.rho),
           l.w.sizes[0],
           l.w.numel() / l.w.sizes[0],
           0,
           0,
           0,
           0};
    if (p.g.flat(p.cols) && p.w.flat(p.cols) && p.z.flat(p.cols) && p.u.flat(p.cols)) {
      p.cols *= p.rows;
      p.rows = 1;
    }
    const bool gathered = p.g.gathered() || p.w.gathered() || p.z.gathered() || p.u.gathered();
    const int64_t area = gathered ? kGathered : kTile;
    p.cols_per_tile = std::min(p.cols, area);
    p.rows_per_tile = std::max<int64_t>(1, area / p.cols_per_tile);
    p.col_tiles = div_up(p.cols, p.cols_per_tile);
    p.end = tiles += div_up(p.rows, p.rows_per_tile) * p.col_tiles;
    weights += l.w.numel();
    plans.push_back(std::move(p));
  }
  threads_for(weights, parallel).run(tiles, [&](int64_t index) {
    const auto p =
        std::upper_bound(plans.begin(), plans.end(), index, [](int64_t i, const Plan& x) { return i < x.end; });
    const int64_t tile = index - (p == plans.begin() ? 0 : (p - 1)->end);
    const int64_t m = tile % p->col_tiles * p->cols_per_tile;
    const int64_t cols = std::min(p->cols_per_tile, p->cols - m);
    const int64_t end = std::min(p->rows, (tile / p->col_tiles + 1) * p->rows_per_tile);
    Buffer g, w, z, u;
    for (int64_t o = tile / p->col_tiles * p->rows_per_tile; o < end; ++o) {
      p->kernel->penalty({p->g.load(o, m, 1, cols, g.data).data, p->w.load(o, m, 1, cols, w.data).data,
                          p->z.load(o, m, 1, cols, z.data).as<float>(), p->u.load(o, m, 1, cols, u.data).as<float>(),
                          p->rho, cols});
      p->g.save(o, m, 1, cols, g.data);
    }
  });
}

}  // namespace structadmm
