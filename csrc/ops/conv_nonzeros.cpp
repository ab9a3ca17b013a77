// The family "nonzeros": convolution and linear layer over single weights, through csrc/kernels/conv_nonzeros.
//
// Outputs are cut three times. A *region* is the rectangle of one image that one lane computes: the whole map where
// there are images enough to fill the lanes, else a part of it. A *block* is a part of the regions, the same of every
// lane, whose sums and patches stay in the level-2 cache. A *tile* of it is what registers hold. Channels come in
// chunks whose patch of one tile stays in the level-1 cache, for all filters, while the sums go by.
//
// Planes in lanes say themselves what the regions are; their patches are gathered tile by tile.
#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/div_up.h"
#include "base/scratch.h"
#include "kernels/conv_nonzeros/conv_nonzeros.h"
#include "ops/conv.h"
#include "ops/spec_table.h"
#include "ops/steps.h"

namespace structadmm {
namespace {

using kernels::ConvNonzeros;
using kernels::kMostLanes;
using kernels::kMostTileCols;
using kernels::kMostTileRows;
using kernels::Nonzero;

constexpr int64_t kBlockSumVectors = 10240;  // of all filters: 640 KiB in AVX-512, a third of level 2
constexpr int64_t kSorted = 16;              // filters that are put in order among themselves
constexpr int64_t kSerialMacs = 1 << 22;     // some seventy microseconds of work: waking a pool costs as much

// The single weights of all filters, in canonical order.
struct Weights {
  struct One {
    int32_t channel;   // place in `channels` of its conv group
    int32_t position;  // ky * kernel[1] + kx
    float weight;
  };
  std::vector<One> ones;
  std::vector<int64_t> begin;                  // [filters + 1]
  std::vector<std::vector<int32_t>> channels;  // per conv group: those that some filter reads, ascending
  std::vector<float> bias;                     // [filters]
};

Weights nonzeros(const char* op, const ConvSpec& s) {
  check(op, table_of(s));
  const int64_t positions = s.kernel[0] * s.kernel[1], per_channels = s.in_channels / s.groups;
  int64_t filters = 0;
  for (const int32_t n : s.block_filters) filters += n;
  SADMM_CHECK(filters == s.out_channels, op, ": block_filters got ", filters, " filters in all, wanted out_channels ",
              s.out_channels);
  const int64_t per_group = filters / s.groups;

  Weights w;
  w.begin.push_back(0);
  w.bias = s.bias;
  w.bias.resize(filters, 0.0f);
  const float* row = s.weight.data();
  for (size_t b = 0; b < s.block_filters.size(); ++b) {
    const int64_t first = s.block_taps[b], taps = s.block_taps[b + 1] - first;
    for (int32_t f = 0; f < s.block_filters[b]; ++f, row += taps) {
      for (int64_t i = 0; i < taps; ++i) {
        if (row[i] == 0.0f) continue;
        const int64_t tap = s.taps[first + i];
        w.ones.push_back({static_cast<int32_t>(tap / positions), static_cast<int32_t>(tap % positions), row[i]});
      }
      w.begin.push_back(static_cast<int64_t>(w.ones.size()));
    }
  }
  SADMM_CHECK(w.ones.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()), op, ": weight got ",
              w.ones.size(), " nonzeros, wanted fewer than 2^31");
  for (int64_t g = 0; g < s.groups; ++g) {
    std::vector<int32_t> place(per_channels, -1), channels;
    const auto begin = w.ones.begin() + w.begin[g * per_group], end = w.ones.begin() + w.begin[(g + 1) * per_group];
    for (auto one = begin; one != end; ++one) place[one->channel] = 0;
    for (int64_t c = 0; c < per_channels; ++c) {
      if (place[c] < 0) continue;
      place[c] = static_cast<int32_t>(channels.size());
      channels.push_back(static_cast<int32_t>(g * per_channels + c));
    }
    for (auto one = begin; one != end; ++one) one->channel = place[one->channel];
    w.channels.push_back(std::move(channels));
  }
  return w;
}

// One axis of a patch that serves `out` outputs: inputs are split by phase (index modulo stride), so that the next
// output reads the next place whatever the stride; phases that no kernel position reads are left out.
struct Axis {
  int64_t in = 0, size = 0;     // inputs that are read; places
  std::vector<int32_t> place;   // [in], negative where no kernel position reads
  std::vector<int64_t> offset;  // [kernel]
};

Axis make_axis(int64_t out, int64_t kernel, int64_t stride, int64_t dilation) {
  Axis a;
  a.in = (out - 1) * stride + (kernel - 1) * dilation + 1;
  const int64_t length = div_up(a.in, stride);
  std::vector<int64_t> slot(stride, -1);
  int64_t phases = 0;
  for (int64_t k = 0; k < kernel; ++k) {
    int64_t& s = slot[k * dilation % stride];
    if (s < 0) s = phases++;
    a.offset.push_back(s * length + k * dilation / stride);
  }
  a.size = phases * length;
  for (int64_t i = 0; i < a.in; ++i) {
    const int64_t s = slot[i % stride];
    a.place.push_back(s < 0 ? -1 : static_cast<int32_t>(s * length + i / stride));
  }
  return a;
}

// How outputs and channels are cut: rows and columns of a region, a block, a tile; channels at a time.
struct Cut {
  int64_t regions[2], region[2], block[2], tile[2], chunk;  // chunk: channels
};

struct Sizes {
  int64_t images, out[2], kernel[2], stride[2], dilation[2];
  int64_t filters, channels;  // of a conv group
  double per_filter;          // nonzeros
  Grid grid;                  // of those planes that are in lanes
  bool x_in_lanes, y_in_lanes;
};

// In multiply-adds of a vector out of level 1, measured on Granite Rapids: a sum that comes and goes counts 1, a vector
// packed or unpacked 8, a filter of a tile 10; short chains wait for themselves, 8.
double cut_cost(const Sizes& s, int lanes, const Cut& c) {
  const int vectors = static_cast<int>(c.tile[0] * c.tile[1]);
  double tiles = static_cast<double>(div_up(s.images * c.regions[0] * c.regions[1], lanes));
  double patch = tiles, outputs = tiles;
  for (int i = 0; i < 2; ++i) {
    const int64_t blocks = div_up(c.region[i], c.block[i]);
    tiles *= static_cast<double>(div_up(c.region[i], c.tile[i]));
    patch *= static_cast<double>(blocks * (s.kernel[i] - 1) * s.dilation[i] + c.region[i] * s.stride[i]);
    outputs *= static_cast<double>(c.region[i]);
  }
  const double nonzero = std::max(vectors + 1.0, 8.0 / kernels::filters_at_once(vectors));
  const double filters = static_cast<double>(s.filters), chunks = static_cast<double>(div_up(s.channels, c.chunk));
  return tiles * filters * (s.per_filter * nonzero + chunks * (vectors + 10.0)) +
         (s.x_in_lanes ? 4.0 : 8.0) * patch * static_cast<double>(s.channels) +
         (s.y_in_lanes ? 4.0 : 8.0) * outputs * filters;
}

Cut best_cut(const Sizes& s, const ConvNonzeros& k) {
  Cut best{};
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](Cut c) {
    const int64_t patch = c.tile[0] * c.tile[1] <= 2 ? k.patch_small : k.patch;
    int64_t places = 1;
    for (int i = 0; i < 2; ++i) {
      places *= make_axis(c.tile[i], s.kernel[i], s.stride[i], s.dilation[i]).size;
      c.block[i] = std::min(c.region[i], c.tile[i]);
    }
    c.chunk = std::clamp<int64_t>(patch / places, 1, std::max<int64_t>(s.channels, 1));
    c.chunk = div_up(s.channels, std::max<int64_t>(1, div_up(s.channels, c.chunk)));
    // The block grows by tiles while its sums fit, to the right first: whole rows of planes are read and written at
    // once (measured: 10 % of a network of 3 x 3 convolutions).
    for (int side = 1; side >= 0 && !s.x_in_lanes; --side) {
      const int64_t line = c.block[1 - side] * s.filters;
      while (c.block[side] < c.region[side] && (c.block[side] + c.tile[side]) * line <= kBlockSumVectors) {
        c.block[side] = std::min(c.region[side], c.block[side] + c.tile[side]);
      }
    }
    if (const double cost = cut_cost(s, k.lanes, c); cost < least) {
      least = cost;
      best = c;
    }
  };
  for (int64_t ry = 1; ry <= std::min<int64_t>(s.out[0], k.lanes); ++ry) {
    for (int64_t rx = 1; rx <= std::min<int64_t>(s.out[1], k.lanes / ry); ++rx) {
      Cut c{};
      c.region[0] = div_up(s.out[0], ry);
      c.region[1] = div_up(s.out[1], rx);
      for (int i = 0; i < 2; ++i) c.regions[i] = div_up(s.out[i], c.region[i]);
      if (c.regions[0] != ry || c.regions[1] != rx) continue;
      if (s.grid.images > 0 && (ry != s.grid.rows || rx != s.grid.cols)) continue;
      for (int64_t r = 1; r <= std::min<int64_t>(c.region[0], kMostTileRows); ++r) {
        for (int64_t q = 1; q <= std::min<int64_t>(c.region[1], kMostTileCols); ++q) {
          if (!k.sum[r - 1][q - 1]) continue;
          c.tile[0] = r;
          c.tile[1] = q;
          consider(c);
        }
      }
    }
  }
  return best;
}

// Of one conv group.
struct Chunk {
  const int32_t* channels;
  int64_t channel_count;
  const int32_t* begin;  // [filters + 1] into the step's nonzeros
  const int32_t* shift;  // [filters] see NonzerosSumArgs
};

class NonzerosStep final : public Step {
 public:
  NonzerosStep(std::shared_ptr<const Weights> weights, const ConvSpec& s, const Planes& x, const Planes& y,
               const Planes* residual, int64_t images, Isa isa)
      : weights_(std::move(weights)),
        kernels_(kernels::conv_nonzeros(isa)),
        epilogue_(s.epilogue),
        x_(x),
        y_(y),
        groups_(s.groups),
        filters_(s.out_channels / s.groups),
        padding_{s.padding[0], s.padding[1]},
        stride_{s.stride[0], s.stride[1]} {
    if (residual) residual_ = *residual;
    Sizes sizes{.images = std::max<int64_t>(images, 1),
                .out = {y.height, y.width},
                .kernel = {s.kernel[0], s.kernel[1]},
                .stride = {s.stride[0], s.stride[1]},
                .dilation = {s.dilation[0], s.dilation[1]},
                .filters = filters_,
                .channels = 1,
                .per_filter = static_cast<double>(weights_->ones.size()) / static_cast<double>(s.out_channels),
                .grid = x.in_lanes()   ? x.grid
                        : y.in_lanes() ? y.grid
                                       : residual_.grid,
                .x_in_lanes = x.in_lanes(),
                .y_in_lanes = y.in_lanes()};
    for (const auto& channels : weights_->channels) {
      sizes.channels = std::max(sizes.channels, static_cast<int64_t>(channels.size()));
    }
    cut_ = best_cut(sizes, kernels_);
    for (int i = 0; i < 2; ++i) axis_[i] = make_axis(cut_.block[i], s.kernel[i], s.stride[i], s.dilation[i]);
    const int64_t lanes = kernels_.lanes;
    row_stride_ = axis_[1].size * lanes;
    // An odd number of vectors: a power of two would let channels share few cache sets.
    channel_stride_ = (axis_[0].size * axis_[1].size | 1) * lanes;
    patch_floats_ = div_up(cut_.chunk * channel_stride_, kMostLanes) * kMostLanes;
    sum_floats_ = cut_.block[0] * cut_.block[1] * filters_ * lanes;
    // Features lie one behind the other: four channels of an image are then read, or four filters written, at a time.
    x_features_ = axis_[0].size * axis_[1].size == 1 && x.channel_stride == 1;
    y_features_ = y.height * y.width == 1 && y.channel_stride == 1 && (!residual || residual->channel_stride == 1);
    direct_ = y.in_lanes() && epilogue_.activation == Activation::kClamp && (!residual || residual->in_lanes());
    add_chunks(s);
    if (x.in_lanes()) add_places();
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    const int64_t per_image = cut_.regions[0] * cut_.regions[1];
    const int64_t lane_groups = div_up(images * per_image, kernels_.lanes);
    int64_t blocks = 1;
    for (int i = 0; i < 2; ++i) blocks *= div_up(cut_.region[i], cut_.block[i]);
    const int64_t units = lane_groups * blocks * groups_;
    const int64_t macs = static_cast<int64_t>(weights_->ones.size()) * y_.height * y_.width * images;
    const bool serial = macs < kSerialMacs || parallel.threads() == 1;
    // Filters are split where there are too few units to share out evenly: as little as will do, for each part packs
    // its patches again; and not where they change places.
    const int64_t threads = serial ? 1 : parallel.threads();
    int64_t parts = 1;
    const int64_t window = sorts() ? kSorted : 1, most = div_up(filters_, window);
    while (units * parts < 4 * threads && units * parts % threads != 0 && parts < most) ++parts;
    const auto task = [&](int64_t i) {
      const int64_t part = i % parts, block = i / parts % blocks, unit = i / parts / blocks;
      run_block(inputs, static_cast<float*>(output), images, unit / groups_, unit % groups_, block,
                part * most / parts * window, std::min(filters_, (part + 1) * most / parts * window));
    };
    if (serial) {
      for (int64_t i = 0; i < units * parts; ++i) task(i);
    } else {
      parallel.run(units * parts, task);
    }
  }

  // After the tile: which of x and y are in lanes.
  std::string kernel() const override {
    const std::string lanes = std::string(x_.in_lanes() ? "x" : "") + (y_.in_lanes() ? "y" : "");
    return "conv_nonzeros_f32_" + std::to_string(cut_.tile[0]) + "x" + std::to_string(cut_.tile[1]) +
           (lanes.empty() ? "" : "_" + lanes) + "__" + kernels_.isa;
  }

 private:
  void add_chunks(const ConvSpec& s) {
    nonzeros_.reserve(weights_->ones.size());
    std::vector<size_t> begins, shifts;
    std::vector<int64_t> next(filters_), end(filters_);
    for (int64_t g = 0; g < groups_; ++g) {
      const auto& channels = weights_->channels[g];
      const auto count = static_cast<int64_t>(channels.size());
      for (int64_t f = 0; f < filters_; ++f) next[f] = weights_->begin[g * filters_ + f];
      first_chunk_.push_back(chunks_.size());
      // A group without channels has one chunk too: its outputs are the bias.
      for (int64_t first = 0; first == 0 || first < count; first += cut_.chunk) {
        const int64_t last = std::min(count, first + cut_.chunk);
        begins.push_back(begin_.size());
        shifts.push_back(filter_shift_.size());
        chunks_.push_back({channels.data() + first, last - first, nullptr, nullptr});
        for (int64_t f = 0; f < filters_; ++f) {
          end[f] = next[f];
          while (end[f] < weights_->begin[g * filters_ + f + 1] && weights_->ones[end[f]].channel < last) ++end[f];
        }
        for (int64_t at = 0; at < filters_; ++at) {
          if (at % kSorted == 0) add_order(at, next, end);
          const int64_t f = at + filter_shift_[shifts.back() + at];
          begin_.push_back(static_cast<int32_t>(nonzeros_.size()));
          for (int64_t& i = next[f]; i < end[f]; ++i) {
            const auto& one = weights_->ones[i];
            const int64_t base = x_features_ ? channels[one.channel] - channels[first] : one.channel - first;
            const int64_t offset = base * (x_features_ ? kernels_.lanes : channel_stride_) +
                                   axis_[0].offset[one.position / s.kernel[1]] * row_stride_ +
                                   axis_[1].offset[one.position % s.kernel[1]] * kernels_.lanes;
            nonzeros_.push_back({static_cast<int32_t>(offset), one.weight});
          }
        }
        begin_.push_back(static_cast<int32_t>(nonzeros_.size()));
        if (x_features_ && last > first) {
          const auto reach = static_cast<size_t>(channels[last - 1] - channels[first] + 1);
          if (feature_place_.size() < reach) feature_place_.resize(reach);
        }
      }
    }
    first_chunk_.push_back(chunks_.size());
    for (size_t i = 0; i < chunks_.size(); ++i) {
      chunks_[i].begin = begin_.data() + begins[i];
      chunks_[i].shift = filter_shift_.data() + shifts[i];
    }
    for (size_t i = 0; i < feature_place_.size(); ++i) feature_place_[i] = static_cast<int32_t>(i);
    const auto features = static_cast<int64_t>(feature_place_.size()) * kernels_.lanes;
    patch_floats_ = std::max(patch_floats_, div_up(features, kMostLanes) * kMostLanes);
  }

  // Whether filters change places. One by one they are left as they are: their sums come and go in order (measured: 5 %
  // of a layer).
  bool sorts() const { return kernels::filters_at_once(static_cast<int>(cut_.tile[0] * cut_.tile[1])) > 1; }

  // The shifts of up to kSorted filters from `first` on: those of many nonzeros come first, for a kernel that sums a
  // few filters together goes on with single ones where the shortest ends.
  void add_order(int64_t first, std::span<const int64_t> begin, std::span<const int64_t> end) {
    std::vector<int64_t> order;
    for (int64_t f = first; f < std::min(filters_, first + kSorted); ++f) order.push_back(f);
    if (sorts()) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return end[a] - begin[a] > end[b] - begin[b]; });
    }
    for (const int64_t f : order) filter_shift_.push_back(static_cast<int32_t>(f - first++));
  }

  // Where the vectors of each block's patch come from, if x is in lanes.
  void add_places() {
    const Grid& grid = x_.grid;
    const int64_t size[2] = {x_.height / grid.rows, x_.width / grid.cols};
    const auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); };
    std::map<std::pair<int64_t, int64_t>, int32_t> shifts;
    const auto shift = [&](int64_t down, int64_t right) {
      const auto [known, fresh] = shifts.emplace(std::pair(down, right), static_cast<int32_t>(shifts.size()));
      if (!fresh) return known->second;
      for (int64_t l = 0; l < kMostLanes; ++l) {
        const int64_t row = l / grid.cols % grid.rows + down, col = l % grid.cols + right;
        const bool inside = l < grid.lanes() && row >= 0 && row < grid.rows && col >= 0 && col < grid.cols;
        shifts_.push_back(inside ? static_cast<int32_t>(l + down * grid.cols + right) : -1);
      }
      return known->second;
    };
    for (int64_t row = 0; row < cut_.region[0]; row += cut_.block[0]) {
      for (int64_t col = 0; col < cut_.region[1]; col += cut_.block[1]) {
        Places p;
        std::vector<kernels::NonzerosPlace> moved;
        const auto [rows, cols] = inputs_of(row, col);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < cols; ++j) {
            if (axis_[0].place[i] < 0 || axis_[1].place[j] < 0) continue;
            const int64_t y = row * stride_[0] - padding_[0] + i, x = col * stride_[1] - padding_[1] + j;
            const int64_t down = floor_div(y, size[0]), right = floor_div(x, size[1]);
            const int64_t from = (y - down * size[0]) * x_.pitch + (x - right * size[1]) * grid.lanes();
            const int64_t to = axis_[0].place[i] * row_stride_ + axis_[1].place[j] * grid.lanes();
            (down == 0 && right == 0 ? p.all : moved)
                .push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), shift(down, right)});
          }
        }
        p.as_they_are = static_cast<int64_t>(p.all.size());
        p.all.insert(p.all.end(), moved.begin(), moved.end());
        places_.push_back(std::move(p));
      }
    }
  }

  // Rows and columns of x that the block of outputs at `row`, `col` of a region reads.
  std::pair<int64_t, int64_t> inputs_of(int64_t row, int64_t col) const {
    const int64_t at[2] = {row, col};
    int64_t in[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t missing = std::max<int64_t>(0, at[i] + cut_.block[i] - cut_.region[i]);
      in[i] = axis_[i].in - missing * stride_[i];
    }
    return {in[0], in[1]};
  }

  struct Lanes {
    int64_t x[kMostLanes], y[kMostLanes], residual[kMostLanes];
    int32_t first_row[kMostLanes], first_col[kMostLanes];  // in the region
    bool whole = true;
  };

  // Regions at the end of a map reach back into their neighbours, which own what both compute.
  Lanes lanes_of(int64_t group, int64_t images, int64_t row, int64_t col) const {
    Lanes lanes;
    const int64_t per_image = cut_.regions[0] * cut_.regions[1];
    for (int l = 0; l < kernels_.lanes; ++l) {
      int64_t index = group * kernels_.lanes + l;
      const bool missing = index >= images * per_image;
      if (missing) index = group * kernels_.lanes;
      const int64_t n = index / per_image, region = index % per_image;
      const int64_t own[2] = {region / cut_.regions[1] * cut_.region[0], region % cut_.regions[1] * cut_.region[1]};
      const int64_t y = std::min(own[0], y_.height - cut_.region[0]), x = std::min(own[1], y_.width - cut_.region[1]);
      lanes.first_row[l] = static_cast<int32_t>(missing ? cut_.region[0] : own[0] - y);
      lanes.first_col[l] = static_cast<int32_t>(own[1] - x);
      lanes.whole = lanes.whole && lanes.first_row[l] == 0 && lanes.first_col[l] == 0;
      if (!x_.in_lanes()) {
        lanes.x[l] = x_.at(n, 0, (y + row) * stride_[0] - padding_[0], (x + col) * stride_[1] - padding_[1]);
      }
      if (!y_.in_lanes()) lanes.y[l] = y_.at(n, 0, y + row, x + col);
      if (!residual_.in_lanes()) lanes.residual[l] = residual_.at(n, 0, y + row, x + col);
      lanes.first_row[l] -= static_cast<int32_t>(row);
      lanes.first_col[l] -= static_cast<int32_t>(col);
    }
    return lanes;
  }

  void run_block(std::span<const void* const> inputs, float* output, int64_t images, int64_t lane_group, int64_t group,
                 int64_t block, int64_t first, int64_t last) const {
    const int64_t across = div_up(cut_.region[1], cut_.block[1]);
    const int64_t row = block / across * cut_.block[0], col = block % across * cut_.block[1];
    const int64_t rows = std::min(cut_.block[0], cut_.region[0] - row);
    const int64_t cols = std::min(cut_.block[1], cut_.region[1] - col);
    Lanes lanes = lanes_of(lane_group, images, row, col);
    float* const patch = scratch(patch_floats_ + sum_floats_, Scratch::kPanel);
    float* const all_sums = patch + patch_floats_;

    const auto [in_rows, in_cols] = inputs_of(row, col);
    kernels::NonzerosPackArgs pack{
        .x = static_cast<const float*>(inputs[0]),
        .lane = lanes.x,
        .channels = nullptr,
        .channel_count = 0,
        .channel_stride = x_.channel_stride,
        .row_stride = x_.pitch,
        .rows = in_rows,
        .cols = in_cols,
        .row_place = axis_[0].place.data(),
        .col_place = axis_[1].place.data(),
        .patch = patch,
        .patch_channel_stride = channel_stride_,
        .patch_row_stride = row_stride_,
    };
    for (size_t i = first_chunk_[group]; i < first_chunk_[group + 1]; ++i) {
      const Chunk& chunk = chunks_[i];
      if (x_.in_lanes()) {
        const Places& places = places_[block];
        kernels_.gather({
            .x = pack.x + lane_group * x_.image_stride,
            .channels = chunk.channels,
            .channel_count = chunk.channel_count,
            .channel_stride = x_.channel_stride,
            .places = places.all.data(),
            .as_they_are = places.as_they_are,
            .place_count = static_cast<int64_t>(places.all.size()),
            .shifts = shifts_.data(),
            .patch = patch,
            .patch_channel_stride = channel_stride_,
        });
      } else {
        pack.channels = chunk.channels;
        pack.channel_count = chunk.channel_count;
        if (x_features_ && chunk.channel_count > 0) {
          pack.channel_count = 1;
          pack.cols = chunk.channels[chunk.channel_count - 1] - chunk.channels[0] + 1;
          pack.col_place = feature_place_.data();
        }
        kernels_.pack(pack);
      }
      const bool starts = i == first_chunk_[group], ends = i + 1 == first_chunk_[group + 1];
      float* sums = all_sums;
      for (int64_t r = 0; r < rows; r += cut_.tile[0]) {
        const int64_t tile_rows = std::min(cut_.tile[0], rows - r);
        const float* const row_of_tiles = sums;
        for (int64_t q = 0; q < cols; q += cut_.tile[1]) {
          const int64_t tile_cols = std::min(cut_.tile[1], cols - q);
          kernels::NonzerosSumArgs sum{
              .patch = patch + r * row_stride_ + q * kernels_.lanes,
              .row_stride = row_stride_,
              .nonzeros = nonzeros_.data(),
              .begin = chunk.begin + first,
              .shift = chunk.shift + first,
              .filters = last - first,
              .bias = starts ? weights_->bias.data() + group * filters_ + first : nullptr,
              .sums = sums,
          };
          if (ends && direct_) to_lanes(inputs, output, {lane_group, row + r, col + q}, group * filters_ + first, sum);
          kernels_.sum[tile_rows - 1][tile_cols - 1](sum);
          sums += (last - first) * tile_rows * tile_cols * kernels_.lanes;
        }
        if (ends && !direct_) {
          unpack(inputs, output, lanes, {lane_group, row + r, col}, r, group * filters_ + first, last - first,
                 tile_rows, cols, row_of_tiles);
        }
      }
    }
  }

  // Where a row of tiles begins, for planes in lanes.
  struct At {
    int64_t lane_group, row, col;
    int64_t in(const Planes& p) const { return lane_group * p.image_stride + row * p.pitch + col * p.grid.lanes(); }
  };

  // The sums of a tile that is at `at`, and of filters from `filter` on, go to y at once.
  void to_lanes(std::span<const void* const> inputs, float* output, const At& at, int64_t filter,
                kernels::NonzerosSumArgs& sum) const {
    sum.y = output + filter * y_.channel_stride + at.in(y_);
    sum.filter_stride = y_.channel_stride;
    sum.y_row_stride = y_.pitch;
    sum.low = epilogue_.low;
    sum.high = epilogue_.high;
    if (!epilogue_.residual) return;
    sum.residual = static_cast<const float*>(inputs[1]) + filter * residual_.channel_stride + at.in(residual_);
    sum.residual_filter_stride = residual_.channel_stride;
    sum.residual_row_stride = residual_.pitch;
  }

  // row: within the block.
  void unpack(std::span<const void* const> inputs, float* output, const Lanes& lanes, const At& at, int64_t row,
              int64_t filter, int64_t filters, int64_t rows, int64_t cols, const float* sums) const {
    int32_t first_row[kMostLanes];
    for (int l = 0; l < kernels_.lanes; ++l) first_row[l] = lanes.first_row[l] - static_cast<int32_t>(row);
    kernels::NonzerosUnpackArgs a{
        .sums = sums,
        .filters = filters,
        .rows = rows,
        .cols = cols,
        .tile_cols = cut_.tile[1],
        .y = output + filter * y_.channel_stride + (y_.in_lanes() ? at.in(y_) : row * y_.pitch),
        .lane = lanes.y,
        .filter_stride = y_.channel_stride,
        .row_stride = y_.pitch,
        .residual = nullptr,
        .residual_lane = residual_.in_lanes() ? nullptr : lanes.residual,
        .residual_filter_stride = residual_.channel_stride,
        .residual_row_stride = residual_.pitch,
        .first_row = first_row,
        .first_col = lanes.first_col,
        .whole = lanes.whole,
        .epilogue = &epilogue_,
    };
    if (epilogue_.residual) {
      a.residual = static_cast<const float*>(inputs[1]) + filter * residual_.channel_stride +
                   (residual_.in_lanes() ? at.in(residual_) : row * residual_.pitch);
    }
    if (y_features_) {
      a.cols = a.tile_cols = filters;
      a.filters = 1;
    }
    (y_.in_lanes() ? kernels_.finish : kernels_.unpack)(a);
  }

  std::shared_ptr<const Weights> weights_;
  const ConvNonzeros& kernels_;
  Epilogue epilogue_;
  Planes x_, y_, residual_;
  int64_t groups_, filters_, padding_[2], stride_[2];
  Cut cut_;
  Axis axis_[2];
  int64_t row_stride_ = 0, channel_stride_ = 0, patch_floats_ = 0, sum_floats_ = 0;
  bool x_features_ = false, y_features_ = false;
  bool direct_ = false;            // whether sums go to y without a stop: in lanes, and with no curve
  std::vector<Nonzero> nonzeros_;  // chunk after chunk, filter after filter in the order of filter_shift_
  std::vector<int32_t> begin_, feature_place_;
  std::vector<int32_t> filter_shift_;
  std::vector<Chunk> chunks_;
  std::vector<size_t> first_chunk_;  // [groups + 1]
  struct Places {
    std::vector<kernels::NonzerosPlace> all;
    int64_t as_they_are = 0;
  };
  std::vector<Places> places_;   // of the blocks of a region
  std::vector<int32_t> shifts_;  // [][kMostLanes]
};

void check_planes(const char* op, const char* name, const Planes& p, int64_t channels, int64_t height, int64_t width) {
  SADMM_CHECK(p.dtype == Dtype::kF32, op, ": ", name, " got ", dtype_name(p.dtype), " planes, wanted f32");
  SADMM_CHECK(p.channels == channels && p.height == height && p.width == width, op, ": ", name, " got planes of ",
              p.channels, " x ", p.height, " x ", p.width, ", wanted ", channels, " x ", height, " x ", width);
}

class PackedNonzeros final : public PackedConv {
 public:
  PackedNonzeros(const char* op, const ConvSpec& spec, Isa isa)
      : op_(op), spec_(spec), weights_(std::make_shared<const Weights>(nonzeros(op, spec))), isa_(isa) {
    // Only `weights_` holds them from now on.
    for (auto* v : {&spec_.weight, &spec_.bias}) *v = {};
    for (auto* v : {&spec_.taps, &spec_.block_filters, &spec_.block_taps}) *v = {};
  }

  const char* family() const override { return "nonzeros"; }

  int64_t lanes() const override { return kernels::conv_nonzeros(isa_).lanes; }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    const ConvSpec& s = spec_;
    check_planes(op_, "x", x, s.in_channels, x.height, x.width);
    const int64_t out[2] = {s.out_size(0, x.height), s.out_size(1, x.width)};
    SADMM_CHECK(out[0] >= 1 && out[1] >= 1, op_, ": x got planes of ", x.height, " x ", x.width,
                ", wanted at least what the kernel spans");
    check_planes(op_, "y", y, s.out_channels, out[0], out[1]);
    SADMM_CHECK((residual != nullptr) == s.epilogue.residual, op_, ": residual got ", residual ? "planes" : "none",
                ", wanted what the epilogue says");
    if (residual) check_planes(op_, "residual", *residual, s.out_channels, out[0], out[1]);
    const int64_t size[2] = {x.height, x.width}, before[2] = {x.halo.top, x.halo.left},
                  behind[2] = {x.halo.bottom, x.halo.right};
    Grid grid;
    for (const Planes* p : {&x, &y, residual}) {
      if (!p || !p->in_lanes()) continue;
      SADMM_CHECK(grid == Grid{} || grid == p->grid, op_, ": planes in lanes got two grids, wanted one");
      grid = p->grid;
      SADMM_CHECK(grid.lanes() == lanes() && fits(grid, s, size, out), op_, ": planes in lanes got a grid of ",
                  grid.images, " x ", grid.rows, " x ", grid.cols, ", wanted ", lanes(), " lanes that fit the maps");
    }
    for (int i = 0; i < 2 && !x.in_lanes(); ++i) {
      const int64_t reach = (out[i] - 1) * s.stride[i] + (s.kernel[i] - 1) * s.dilation[i] - s.padding[i] - size[i] + 1;
      SADMM_CHECK(before[i] >= s.padding[i] && behind[i] >= reach, op_, ": x got a halo of ", before[i], " and ",
                  behind[i], ", wanted ", s.padding[i], " and ", std::max<int64_t>(reach, 0));
    }
    return std::make_unique<NonzerosStep>(weights_, s, x, y, residual, images, isa_);
  }

 private:
  const char* op_;
  ConvSpec spec_;
  std::shared_ptr<const Weights> weights_;
  Isa isa_;
};

class PackedLinearNonzeros final : public PackedLinear {
 public:
  explicit PackedLinearNonzeros(std::shared_ptr<const PackedConv> conv) : conv_(std::move(conv)) {}
  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    return conv_->plan(x, y, residual, images);
  }

 private:
  std::shared_ptr<const PackedConv> conv_;
};

}  // namespace

std::shared_ptr<const PackedConv> pack_conv_nonzeros(const ConvSpec& spec, Isa isa) {
  constexpr auto op = "conv_nonzeros";
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(spec.stride[i] >= 1 && spec.dilation[i] >= 1 && spec.padding[i] >= 0, op, ": got stride ",
                spec.stride[i], ", dilation ", spec.dilation[i], " and padding ", spec.padding[i],
                ", wanted at least 1, 1 and 0");
  }
  return std::make_shared<PackedNonzeros>(op, spec, isa);
}

std::shared_ptr<const PackedLinear> pack_linear_nonzeros(const LinearSpec& spec, Isa isa) {
  ConvSpec conv;
  conv.in_channels = spec.in_features;
  conv.out_channels = spec.out_features;
  conv.weight = spec.weight;
  conv.bias = spec.bias;
  conv.taps = spec.taps;
  conv.block_filters = spec.block_filters;
  conv.block_taps = spec.block_taps;
  conv.epilogue = spec.epilogue;
  return std::make_shared<PackedLinearNonzeros>(std::make_shared<PackedNonzeros>("linear_nonzeros", conv, isa));
}

}  // namespace structadmm
