// Compacted convolution in bf16 on planes: the weight in tiles, and tables of how output pixels lie in x and y.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/div_up.h"
#include "kernels/gemm_bf16/gemm_bf16.h"
#include "ops/conv.h"
#include "ops/spec_table.h"
#include "ops/tap_table.h"

namespace structadmm {
namespace {

using kernels::Gather;
using kernels::GemmBf16;
using kernels::GemmBf16Args;
using kernels::GemmBf16Block;
using kernels::kStepTaps;
using kernels::kTile;
using kernels::PanelPair;
using kernels::PanelVector;
using kernels::PlaneWindow;
using kernels::Read;
using kernels::WeightLayout;

constexpr auto kOp = "conv_taps_bf16";
constexpr int kUnit = 2 * kTile, kPairPixels = 2 * kTile, kWindow = 32;

// Below this many multiply-adds other threads are not worth waking.
// Ten to twenty microseconds on tiles: with less, what one core wrote costs the other more to fetch than it saves
// (measured: ResNet-18/CIFAR at a density of 0.1 and batch 1 took 1.6 times as long on two threads).
constexpr int64_t kSerialMacs = 8 << 20;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<std::byte, Free>;

Bytes allocate(int64_t bytes) {
  constexpr int64_t kLine = 64;
  Bytes p(static_cast<std::byte*>(std::aligned_alloc(kLine, div_up(std::max<int64_t>(bytes, 1), kLine) * kLine)));
  if (!p) throw std::bad_alloc();
  std::memset(p.get(), 0, bytes);
  return p;
}

// Kept by each thread for its next task.
std::byte* scratch(int64_t bytes) {
  thread_local Bytes buffer;
  thread_local int64_t size = 0;
  if (bytes > size) {
    buffer = allocate(bytes);
    size = bytes;
  }
  return buffer.get();
}

uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Block {
  int64_t first_filter, filters, first_tap, taps, steps;
  int32_t first_unit;
  int64_t weight;  // byte offset
  int64_t bias;    // index
};

struct TapPlace {
  int32_t channel, y, x;  // absolute channel, kernel row and column
};

// What all plans share.
struct Weights {
  ConvSpec spec;  // without weight and taps
  const GemmBf16* kernel = nullptr;
  std::vector<Block> blocks;
  std::vector<TapPlace> taps;
  std::vector<float> bias;
  Bytes packed;
  int32_t units = 0;
  int64_t most_steps = 0, macs = 0;  // multiply-adds of an output pixel

  bool tiles() const { return kernel->layout == WeightLayout::kTiles; }
};

std::shared_ptr<const Weights> pack_weights(const ConvSpec& spec, Isa isa) {
  const TapTable t = table_of(spec);
  check(kOp, t);
  int64_t filters = 0;
  for (const int32_t n : spec.block_filters) filters += n;
  SADMM_CHECK(filters == spec.out_channels, kOp, ": block_filters got ", filters, " filters in all, wanted ",
              spec.out_channels);
  for (int i = 0; i < 2; ++i) {
    SADMM_CHECK(spec.stride[i] >= 1, kOp, ": stride got ", spec.stride[i], ", wanted at least 1");
    SADMM_CHECK(spec.dilation[i] >= 1, kOp, ": dilation got ", spec.dilation[i], ", wanted at least 1");
    SADMM_CHECK(spec.padding[i] >= 0, kOp, ": padding got ", spec.padding[i], ", wanted at least 0");
  }

  isa_supported(isa);  // for the permission to use tiles, where nobody has asked yet

  auto w = std::make_shared<Weights>();
  w->spec = spec;
  for (auto* v : {&w->spec.weight, &w->spec.bias}) *v = {};
  for (auto* v : {&w->spec.taps, &w->spec.block_filters, &w->spec.block_taps}) *v = {};
  w->kernel = &kernels::gemm_bf16(isa);
  const bool tiles = w->tiles();
  const int64_t positions = spec.kernel[0] * spec.kernel[1], per_group = filters / spec.groups;
  const int64_t group_channels = spec.in_channels / spec.groups;
  int64_t filter = 0, bytes = 0, bias = 0;
  for (size_t b = 0; b < spec.block_filters.size(); ++b) {
    const int64_t n = spec.block_filters[b], first = spec.block_taps[b], count = spec.block_taps[b + 1] - first;
    w->blocks.push_back({filter, n, first, count, div_up(count, kStepTaps), w->units, bytes, bias});
    const Block& block = w->blocks.back();
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t position = spec.taps[i] % positions;
      w->taps.push_back({static_cast<int32_t>(filter / per_group * group_channels + spec.taps[i] / positions),
                         static_cast<int32_t>(position / spec.kernel[1]),
                         static_cast<int32_t>(position % spec.kernel[1])});
    }
    w->units += static_cast<int32_t>(div_up(n, kUnit));
    w->most_steps = std::max(w->most_steps, block.steps);
    w->macs += n * count;
    bytes += div_up(n, kTile) * kTile * block.steps * kStepTaps * (tiles ? sizeof(Bf16) : sizeof(float));
    bias += div_up(n, kUnit) * kUnit;
    filter += n;
  }
  w->bias.assign(bias, 0.0f);
  w->packed = allocate(bytes);
  const float* from = spec.weight.data();
  for (const Block& b : w->blocks) {
    if (!spec.bias.empty()) std::copy_n(spec.bias.data() + b.first_filter, b.filters, w->bias.data() + b.bias);
    std::byte* to = w->packed.get() + b.weight;
    for (int64_t f = 0; f < b.filters; ++f) {
      const int64_t unit = f / kUnit, in_unit = div_up(std::min<int64_t>(b.filters - unit * kUnit, kUnit), kTile);
      for (int64_t k = 0; k < b.taps; ++k) {
        const uint16_t value = to_bf16(from[f * b.taps + k]);
        if (tiles) {
          const int64_t tile = unit * 2 * b.steps + k / kStepTaps * in_unit + f % kUnit / kTile;
          reinterpret_cast<uint16_t*>(to)[(tile * kTile + f % kTile) * kStepTaps + k % kStepTaps] = value;
        } else {
          const uint32_t bits = static_cast<uint32_t>(value) << 16;
          std::memcpy(to + ((f / kTile * b.steps * kStepTaps + k) * kTile + f % kTile) * sizeof(float), &bits,
                      sizeof bits);
        }
      }
    }
    from += b.filters * b.taps;
  }
  return w;
}

struct Pixel {
  int64_t x, y, residual;
  int32_t image;
};

// Cuts pixels into pieces that lie within `width` elements of x, at most a tile: how many are covered. Positions go
// back where a row's halo on the right is the next one's on the left.
int covered(const Pixel* p, int64_t left, int pieces, int64_t width, int (&ends)[4]) {
  const int most = static_cast<int>(std::min<int64_t>(left, kTile));
  int n = 0;
  for (int i = 0; i < pieces; ++i) {
    const int first = n;
    while (n < most && p[n].x >= p[first].x && p[n].x - p[first].x < width) ++n;
    ends[i] = n;
  }
  return n;
}

// The vector of the next pixels; returns how many it takes. readable: elements of x that a tap at offset 0 may load.
int next_vector(const Pixel* p, int64_t left, int64_t readable, PanelVector& v) {
  const int whole = static_cast<int>(std::min<int64_t>(left, kTile));
  struct Way {
    Gather gather;
    int pieces, width;
  };
  int best = 0, ends[4] = {};
  Way way{Gather::kLanes, 0, 0};
  for (const Way& w : {Way{Gather::kWindow, 1, 32}, Way{Gather::kHalves, 2, 16}, Way{Gather::kQuarters, 4, 8}}) {
    int e[4];
    const int n = covered(p, left, w.pieces, w.width, e);
    if (n <= best || readable < w.width) continue;
    best = n;
    way = w;
    std::copy_n(e, 4, ends);
  }
  // Half empty vectors cost tile products; single loads cost only a panel.
  if (best * 2 < whole) {
    best = whole;
    way = {Gather::kLanes, 0, 0};
  }
  v = {};
  v.gather = way.gather;
  for (int i = 0; i < kTile; ++i) v.lane[i] = static_cast<int32_t>(p[i < best ? i : 0].x);
  int row = 1;
  while (row < best && p[row].x == p[0].x + row) ++row;
  if (row == kTile) {
    v.gather = Gather::kRow;
    v.piece[0] = v.lane[0];
    for (int16_t i = 0; i < kTile; ++i) {
      v.index[2 * i] = i;
      v.index[2 * i + 1] = static_cast<int16_t>(i + kTile);
    }
    return best;
  }
  for (int i = 0, n = 0; i < way.pieces; ++i) {
    // Shifted down where the last planes leave no room behind the pixels.
    const int64_t last = readable - way.width;
    v.piece[i] = static_cast<int32_t>(std::min(n < best ? p[n].x : p[0].x, last));
    for (; n < ends[i]; ++n) v.index[2 * n] = static_cast<int16_t>(i * way.width + p[n].x - v.piece[i]);
  }
  for (int i = 0; i < kTile; ++i) {
    v.index[2 * i] = v.index[2 * (i < best ? i : 0)];
    v.index[2 * i + 1] = static_cast<int16_t>(v.index[2 * i] + kWindow);
  }
  return best;
}

// Windows over the pixels of a pair, n of them; lane[i] is where pixel i stands in the pair.
void cut_windows(const Pixel* p, const int* lane, int n, int64_t Pixel::* place, std::vector<PlaneWindow>& windows) {
  for (int i = 0; i < n;) {
    PlaneWindow w{};
    w.offset = p[i].*place;
    w.image = p[i].image;
    for (; i < n && p[i].image == w.image && p[i].*place - w.offset < kWindow; ++i) {
      const int64_t element = p[i].*place - w.offset;
      w.elements |= 1u << element;
      w.filled |= 1u << element;
      w.pixels |= 1u << lane[i];
      w.to[element] = static_cast<int16_t>(lane[i]);
      w.from[lane[i]] = static_cast<int16_t>(element);
    }
    windows.push_back(w);
  }
}

struct Tables {
  int64_t period = 1;  // images
  std::vector<PanelPair> pairs;
  std::vector<int32_t> first_image;  // of each pair
  std::vector<PanelVector> vectors;
  std::vector<PlaneWindow> windows, residual_windows;
  std::vector<uint32_t> inside;  // [pair][position], where x is the caller's f32
};

// What a table is made for.
struct Lies {
  const Planes &x, &y;
  const Planes* residual;
  int64_t images;
  int64_t nearest, furthest;  // offsets of taps
  bool rows;                  // whether the kernel reads rows of 32 pixels

  // Elements that a tap at offset 0 may load from the first images on.
  int64_t readable(int64_t period) const { return x.readable - furthest - (images - period) * x.image_stride; }
};

int lane_of(int pixel, const PanelPair& pair) {
  return pair.read != Read::kVectors && pair.vectors == 2 ? kernels::row_order(pixel) : pixel;
}

PanelPair next_pair(const Tables& t) {
  PanelPair pair{};
  pair.first_vector = static_cast<int32_t>(t.vectors.size());
  pair.first_window = static_cast<int32_t>(t.windows.size());
  pair.first_residual = static_cast<int32_t>(t.residual_windows.size());
  return pair;
}

// The pair of the vectors and windows that were added since it began.
void add_pair(PanelPair pair, int32_t image, Tables& t) {
  pair.windows = static_cast<int32_t>(t.windows.size()) - pair.first_window;
  pair.residuals = static_cast<int32_t>(t.residual_windows.size()) - pair.first_residual;
  t.pairs.push_back(pair);
  t.first_image.push_back(image);
}

// Which of the caller's pixels the taps find, `taken` outputs from the `first` on; and how they can be read.
Read find_edges(const ConvSpec& s, const Lies& l, int64_t x0, int64_t first, int taken, int vectors, Tables& t) {
  const uint32_t all = taken == kPairPixels ? 0xFFFFFFFF : (1u << taken) - 1;
  bool edges = false;
  for (int64_t ky = 0; ky < s.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < s.kernel[1]; ++kx) {
      uint32_t inside = 0;
      for (int j = 0; j < taken; ++j) {
        const int64_t y = (first + j) / l.x.width + ky * s.dilation[0] - s.padding[0];
        const int64_t x = (first + j) % l.x.width + kx * s.dilation[1] - s.padding[1];
        if (y >= 0 && y < l.x.height && x >= 0 && x < l.x.width) inside |= 1u << j;
      }
      edges = edges || inside != all;
      t.inside.push_back(inside);
    }
  }
  if (x0 + first + l.nearest < 0 || x0 + first + vectors * kTile > l.readable(1)) return Read::kEnds;
  return edges ? Read::kEdges : Read::kRow;
}

// Rows of x with their halo are taken for pixels, 32 at a time: x is read in whole vectors. Where the planes of y lie
// alike and have room for zeros between their rows, so are they written, and no store crosses lines of memory. Sets
// nothing and returns false where rows can't be read so, or where the halo is too much of them.
bool make_row_tables(const ConvSpec& s, const Lies& l, Tables& t) {
  const Planes &x = l.x, &y = l.y;
  const bool caller = x.dtype == Dtype::kF32;
  // Padding can make rows of outputs that are longer than those of x and overlap in it.
  if (s.stride[0] != 1 || s.stride[1] != 1 || x.pitch < y.width) return false;
  const int64_t between = y.pitch - y.width, count = (y.height - 1) * x.pitch + y.width;
  const bool alike = x.pitch == y.pitch && (!l.residual || l.residual->pitch == y.pitch) && !caller && between >= 0 &&
                     between <= std::max(y.halo.left, y.halo.right) && y.dtype == Dtype::kBf16;
  Tables made;
  // Images lie alike in lines.
  while (alike &&
         (l.images % made.period != 0 || (made.period < l.images && made.period * y.image_stride % kWindow != 0))) {
    ++made.period;
  }
  for (int64_t n = 0; n < made.period; ++n) {
    const int64_t x0 = x.at(n, 0, -s.padding[0], -s.padding[1]), y0 = y.at(n, 0, 0, 0);
    for (int64_t i = 0; i < count;) {
      const int64_t line = alike ? kWindow - (y0 + i) % kWindow : kWindow;
      const auto taken = static_cast<int>(std::min(line, count - i));
      PanelPair pair = next_pair(made);
      pair.vectors = static_cast<int32_t>(div_up(taken, kTile));
      pair.read = caller ? find_edges(s, l, x0, i, taken, pair.vectors, made) : l.rows ? Read::kRow : Read::kVectors;
      for (int k = 0; k < pair.vectors; ++k) {
        PanelVector v{};
        v.gather = Gather::kRow;
        for (int16_t j = 0; j < kTile; ++j) {
          v.lane[j] = static_cast<int32_t>(x0 + i + k * kTile + j);
          v.index[2 * j] = j;
          v.index[2 * j + 1] = static_cast<int16_t>(j + kTile);
        }
        v.piece[0] = v.lane[0];
        if (!caller && v.lane[kTile - 1] >= l.readable(made.period)) return false;
        made.vectors.push_back(v);
      }
      Pixel pixels[kPairPixels];
      int lane[kPairPixels], found = 0;
      for (int j = 0; j < taken; ++j) {
        const int64_t oy = (i + j) / x.pitch, ox = (i + j) % x.pitch;
        if (ox >= y.width) continue;
        lane[found] = lane_of(j, pair);
        pixels[found++] = {0, y.at(n, 0, oy, ox), l.residual ? l.residual->at(n, 0, oy, ox) : 0,
                           static_cast<int32_t>(n)};
      }
      if (alike) {
        PlaneWindow w{};
        w.offset = y0 + i;
        w.image = static_cast<int32_t>(n);
        for (int j = 0; j < taken; ++j) {
          const int to = lane_of(j, pair);
          w.to[j] = static_cast<int16_t>(to);
          w.from[to] = static_cast<int16_t>(j);
          w.elements |= 1u << j;
          if ((i + j) % y.pitch >= y.width) continue;
          w.filled |= 1u << j;
          w.pixels |= 1u << to;
        }
        made.windows.push_back(w);
        if (l.residual) {
          w.offset = l.residual->at(n, 0, 0, 0) + i;
          made.residual_windows.push_back(w);
        }
      } else if (found > 0) {
        cut_windows(pixels, lane, found, &Pixel::y, made.windows);
        if (l.residual) cut_windows(pixels, lane, found, &Pixel::residual, made.residual_windows);
      }
      add_pair(pair, static_cast<int32_t>(n), made);
      i += taken;
    }
  }
  constexpr int64_t kMost = 5, kOf = 4;  // vectors
  if (!caller &&
      static_cast<int64_t>(made.vectors.size()) * kOf > div_up(made.period * y.height * y.width, kTile) * kMost) {
    return false;
  }
  t = std::move(made);
  return true;
}

Tables make_tables(const ConvSpec& s, const Lies& l) {
  Tables t;
  if (make_row_tables(s, l, t)) return t;
  const Planes &x = l.x, &y = l.y;
  // Images are cut together until whole pairs are nearly filled, for tables are read along with x; a divisor of all
  // images, so that no pair reads an image that has no place.
  const int64_t outputs = y.height * y.width;
  for (t.period = 1; t.period < l.images; ++t.period) {
    const int64_t all = t.period * outputs;
    if (l.images % t.period == 0 && div_up(all, kPairPixels) * kPairPixels - all <= all / 32) break;
  }
  std::vector<Pixel> pixels;
  for (int64_t n = 0; n < t.period; ++n) {
    for (int64_t oy = 0; oy < y.height; ++oy) {
      for (int64_t ox = 0; ox < y.width; ++ox) {
        pixels.push_back({x.at(n, 0, oy * s.stride[0] - s.padding[0], ox * s.stride[1] - s.padding[1]),
                          y.at(n, 0, oy, ox), l.residual ? l.residual->at(n, 0, oy, ox) : 0, static_cast<int32_t>(n)});
      }
    }
  }
  const auto count = static_cast<int64_t>(pixels.size());
  for (int64_t i = 0; i < count;) {
    const Pixel* p = pixels.data() + i;
    PanelPair pair = next_pair(t);
    int lane[kPairPixels], n = 0;
    while (pair.vectors < 2 && i < count) {
      PanelVector v;
      const int taken = next_vector(pixels.data() + i, count - i, l.readable(t.period), v);
      for (int k = 0; k < taken; ++k) lane[n++] = pair.vectors * kTile + k;
      t.vectors.push_back(v);
      ++pair.vectors;
      i += taken;
    }
    const auto is_row = [&](int k) { return t.vectors[pair.first_vector + k].gather == Gather::kRow; };
    const auto piece = [&](int k) { return t.vectors[pair.first_vector + k].piece[0]; };
    if (l.rows && pair.vectors == 2 && is_row(0) && is_row(1) && piece(1) == piece(0) + kTile) {
      pair.read = Read::kRow;
      for (int k = 0; k < n; ++k) lane[k] = lane_of(lane[k], pair);
    }
    cut_windows(p, lane, n, &Pixel::y, t.windows);
    if (l.residual) cut_windows(p, lane, n, &Pixel::residual, t.residual_windows);
    add_pair(pair, p->image, t);
  }
  return t;
}

class TapsStep final : public Step {
 public:
  TapsStep(std::shared_ptr<const Weights> weights, const Planes& x, const Planes& y, const Planes* residual,
           int64_t images)
      : weights_(std::move(weights)) {
    const ConvSpec& s = weights_->spec;
    int64_t furthest = 0, nearest = weights_->taps.empty() ? 0 : std::numeric_limits<int64_t>::max();
    std::vector<int32_t> offset(weights_->taps.size());
    for (size_t i = 0; i < offset.size(); ++i) {
      const TapPlace& t = weights_->taps[i];
      const int64_t at = t.channel * x.channel_stride + t.y * s.dilation[0] * x.pitch + t.x * s.dilation[1];
      offset[i] = static_cast<int32_t>(at);
      furthest = std::max(furthest, at);
      nearest = std::min(nearest, at);
    }
    tables_ = make_tables(s, {x, y, residual, images, nearest, furthest, weights_->tiles()});
    for (const Block& b : weights_->blocks) {
      for (int64_t k = 0; k < b.steps * kStepTaps; ++k) {
        const int64_t tap = b.first_tap + std::min(k, b.taps - 1);
        offset_.push_back(offset[tap]);
        position_.push_back(static_cast<int32_t>(weights_->taps[tap].y * s.kernel[1] + weights_->taps[tap].x));
      }
    }
    int64_t at = 0;
    for (const Block& b : weights_->blocks) {
      blocks_.push_back({.first_filter = b.first_filter,
                         .filters = static_cast<int32_t>(b.filters),
                         .taps = static_cast<int32_t>(b.taps),
                         .steps = static_cast<int32_t>(b.steps),
                         .first_unit = b.first_unit,
                         .offset = offset_.data() + at,
                         .position = position_.data() + at,
                         .w = weights_->packed.get() + b.weight,
                         .bias = weights_->bias.data() + b.bias});
      at += b.steps * kStepTaps;
    }
    args_ = {.x = nullptr,
             .y = nullptr,
             .x_f32 = x.dtype == Dtype::kF32,
             .y_f32 = y.dtype == Dtype::kF32,
             .residual = nullptr,
             .y_channel_stride = y.channel_stride,
             .residual_channel_stride = residual ? residual->channel_stride : 0,
             .x_period_stride = tables_.period * x.image_stride,
             .y_period_stride = tables_.period * y.image_stride,
             .residual_period_stride = residual ? tables_.period * residual->image_stride : 0,
             .pairs_per_period = static_cast<int64_t>(tables_.pairs.size()),
             .period = static_cast<int32_t>(tables_.period),
             .images = 0,
             .pairs = tables_.pairs.data(),
             .vectors = tables_.vectors.data(),
             .inside = tables_.inside.data(),
             .positions = tables_.inside.empty() ? 0 : static_cast<int32_t>(s.kernel[0] * s.kernel[1]),
             .windows = tables_.windows.data(),
             .residual_windows = tables_.residual_windows.data(),
             .blocks = blocks_.data(),
             .n_blocks = static_cast<int64_t>(blocks_.size()),
             .first_pair = 0,
             .last_pair = 0,
             .first_unit = 0,
             .last_unit = weights_->units,
             .strip = strip_of(y, images, weights_->most_steps, blocks_.size()),
             .epilogue = s.epilogue,
             .scratch = nullptr};
    outputs_ = y.height * y.width;
  }

  void run(std::span<const void* const> inputs, void* output, int64_t images, Parallel& parallel) const override {
    GemmBf16Args all = args_;
    all.x = inputs[0];
    all.y = output;
    if (weights_->spec.epilogue.residual) all.residual = static_cast<const Bf16*>(inputs[1]);
    all.images = static_cast<int32_t>(images);
    const int64_t rest = images % tables_.period;
    const int64_t pairs =
        images / tables_.period * all.pairs_per_period +
        (std::lower_bound(tables_.first_image.begin(), tables_.first_image.end(), rest) - tables_.first_image.begin());
    const int64_t macs = weights_->macs * outputs_ * images;
    const int64_t tasks = macs < kSerialMacs || parallel.threads() == 1 ? 1 : 4 * parallel.threads();
    const int64_t by_pixels = std::min(tasks, pairs);
    const int64_t by_filters = by_pixels ? std::min<int64_t>(div_up(tasks, by_pixels), weights_->units) : 0;
    parallel.run(by_pixels * by_filters, [&](int64_t task) {
      GemmBf16Args a = all;
      const int64_t p = task / by_filters, f = task % by_filters;
      a.first_pair = p * pairs / by_pixels;
      a.last_pair = (p + 1) * pairs / by_pixels;
      a.first_unit = static_cast<int32_t>(f * weights_->units / by_filters);
      a.last_unit = static_cast<int32_t>((f + 1) * weights_->units / by_filters);
      a.scratch = scratch(kernels::gemm_bf16_scratch(weights_->most_steps, a.strip));
      weights_->kernel->run(a);
    });
  }

  std::string kernel() const override { return weights_->kernel->name; }

 private:
  // Where y comes from beyond L2, a long run to one channel after the other (measured: 1.1 to 1.7 times as fast as
  // single pairs), of panels that leave most of L2 to the rest. Where it does not, panels stay in the first cache.
  static int32_t strip_of(const Planes& y, int64_t images, int64_t steps, size_t blocks) {
    constexpr int64_t kSpills = 1 << 20, kPanels = 256 << 10, kOfBlocks = 4;
    if (images * y.channels * y.height * y.width * dtype_size(y.dtype) < kSpills) return blocks > 1 ? kOfBlocks : 1;
    const int64_t panel = std::max<int64_t>(1, steps) * kStepTaps * kPairPixels * static_cast<int64_t>(sizeof(Bf16));
    return static_cast<int32_t>(std::clamp<int64_t>(kPanels / panel, 1, kernels::kMostStrip));
  }

  std::shared_ptr<const Weights> weights_;
  Tables tables_;
  std::vector<int32_t> offset_, position_;
  std::vector<GemmBf16Block> blocks_;
  GemmBf16Args args_{};
  int64_t outputs_ = 0;
};

class PackedTaps final : public PackedConv {
 public:
  PackedTaps(const ConvSpec& spec, Isa isa) : weights_(pack_weights(spec, isa)) {}

  const char* family() const override { return "taps_bf16"; }

  // Where the map keeps its size, so that rows of x are rows of outputs. Each block rounds what it reads, a cycle or
  // two for 32 pixels of a tap; an import writes each channel once, at ten.
  bool takes_f32(int64_t height, int64_t width) const override {
    constexpr int64_t kPositions = 64, kTapsOfChannel = 5;
    const ConvSpec& s = weights_->spec;
    const bool same =
        s.stride[0] == 1 && s.stride[1] == 1 && s.out_size(0, height) == height && s.out_size(1, width) == width;
    const auto taps = static_cast<int64_t>(weights_->taps.size());
    return weights_->tiles() && same && s.kernel[0] * s.kernel[1] <= kPositions &&
           taps <= kTapsOfChannel * s.in_channels;
  }
  bool gives_f32() const override { return true; }

  std::unique_ptr<Step> plan(const Planes& x, const Planes& y, const Planes* residual, int64_t images) const override {
    const ConvSpec& s = weights_->spec;
    const bool caller = x.dtype == Dtype::kF32 && takes_f32(x.height, x.width);
    SADMM_CHECK((caller || x.dtype == Dtype::kBf16) && (y.dtype == Dtype::kBf16 || y.dtype == Dtype::kF32) &&
                    (!residual || residual->dtype == Dtype::kBf16),
                kOp, ": planes got another dtype, wanted bf16");
    SADMM_CHECK(!caller || (x.halo == Halo{} && x.pitch == x.width), kOp,
                ": x of f32 got a halo or gaps between its rows, wanted none");
    SADMM_CHECK(x.channels == s.in_channels, kOp, ": x has ", x.channels, " channels, wanted ", s.in_channels);
    SADMM_CHECK(images >= 1, kOp, ": images got ", images, ", wanted at least 1");
    SADMM_CHECK((residual != nullptr) == s.epilogue.residual, kOp, ": residual got ", residual ? "planes" : "none",
                ", wanted ", s.epilogue.residual ? "planes" : "none");
    SADMM_CHECK(y.channels == s.out_channels && y.height == s.out_size(0, x.height) &&
                    y.width == s.out_size(1, x.width) && y.height >= 1 && y.width >= 1,
                kOp, ": y got [", y.channels, ", ", y.height, ", ", y.width, "], wanted [", s.out_channels, ", ",
                s.out_size(0, x.height), ", ", s.out_size(1, x.width), "]");
    SADMM_CHECK(
        !residual || (residual->channels == y.channels && residual->height == y.height && residual->width == y.width),
        kOp, ": residual got [", residual->channels, ", ", residual->height, ", ", residual->width,
        "], wanted y's sizes");
    const auto reach = [&](int axis, int64_t out, int64_t in) {
      return (out - 1) * s.stride[axis] + (s.kernel[axis] - 1) * s.dilation[axis] - s.padding[axis] - (in - 1);
    };
    SADMM_CHECK(caller || (x.halo.top >= s.padding[0] && x.halo.left >= s.padding[1] &&
                           x.halo.bottom >= reach(0, y.height, x.height) && x.halo.right >= reach(1, y.width, x.width)),
                kOp, ": x got a halo of ", x.halo.top, ", ", x.halo.left, ", ", x.halo.bottom, ", ", x.halo.right,
                ", wanted what the kernel reads");
    // Offsets in the tables are 32 bits wide.
    SADMM_CHECK(x.readable < (int64_t{1} << 31), kOp, ": x got planes of ", x.readable,
                " elements, wanted fewer than 2^31");
    return std::make_unique<TapsStep>(weights_, x, y, residual, images);
  }

 private:
  std::shared_ptr<const Weights> weights_;
};

}  // namespace

std::shared_ptr<const PackedConv> pack_conv_taps_bf16(const ConvSpec& spec, Isa isa) {
  return std::make_shared<PackedTaps>(spec, isa);
}

}  // namespace structadmm
