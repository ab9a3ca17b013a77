#include "runtime/planner.h"

#ifdef __linux__
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/div_up.h"

namespace structadmm::runtime {
namespace {

constexpr int64_t kPlace = 64;  // places begin at cache lines
// Bytes of an output, with more of which it is taken not to stay in an L3 that others share until it is read; of an
// input half as much, for others were written since.
constexpr int64_t kPastCaches = 16 << 20;

// What a byte of an activation that leaves L2 and comes back costs in bytes of weights, which are read in order and
// fetched ahead. Chosen among 2 and 4 on ResNet-18 and ResNet-50 at batch 16 (AVX2, Zen 3).
constexpr double kWayBack = 4;

// STRUCTADMM_L2_BYTES stands in for what the system says, so that a test sees the plans of other machines.
int64_t l2_bytes() {
  constexpr int64_t kLeast = 256 << 10, kMost = 4 << 20;
  if (const char* given = std::getenv("STRUCTADMM_L2_BYTES")) {
    return std::clamp<int64_t>(std::strtoll(given, nullptr, 10), kLeast, kMost);
  }
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::clamp<int64_t>(size, kLeast, kMost);
#else
  return 1 << 20;
#endif
}

// A value as it will lie in memory. Values may be slices of another (operands of a concatenation, flattened pixels).
struct Value {
  int64_t channels = 0, height = 1, width = 1;
  Halo halo, padded;          // padded: of a copy, where the caller's tensor is read without halo
  int root = -1;              // the value whose place this one lies in, itself if none
  int64_t first_channel = 0;  // within the root
  bool direct = false;        // the caller's own tensor
  bool crosses = false;       // stages
  Grid grid;                  // in lanes
  Planes planes;
  Operand operand;
  int born = 0, dies = 0;  // positions of the first writer and the last reader
};

class Planner {
 public:
  Planner(const Graph& graph, const std::vector<std::vector<int64_t>>& shapes, const std::vector<TensorView>& inputs,
          const std::vector<TensorView>& outputs, Dtype dtype, Isa isa, int threads, const Weights& weights)
      : g_(graph), shapes_(shapes), in_(inputs), out_(outputs), dtype_(dtype), isa_(isa), weights_(weights) {
    plan_.batch = inputs.empty() ? 0 : inputs[0].sizes[0];
    plan_.threads = threads;
  }

  Plan make() && {
    describe_values();
    choose_aliases();
    choose_direct();
    cut_stages();
    choose_lanes();
    widen_shared_lives();
    lay_out();
    place();
    plan_steps();
    return std::move(plan_);
  }

 private:
  int count() const { return static_cast<int>(g_.nodes.size()); }
  int root(int v) const { return values_[v].root; }

  // Sizes, and the halo that consumers ask for.
  void describe_values() {
    values_.resize(g_.nodes.size());
    readers_.resize(g_.nodes.size());
    for (int i = 0; i < count(); ++i) {
      Value& v = values_[i];
      const auto& s = shapes_[i];
      v.channels = s[0];
      if (s.size() == 3) v.height = s[1], v.width = s[2];
      v.root = i;
      v.born = v.dies = i;
      for (int x : g_.nodes[i].inputs) readers_[x].push_back(i);
    }
    for (int i = 0; i < count(); ++i) {
      const Node& n = g_.nodes[i];
      if (n.kind != Kind::kConv || as_linear(*n.conv, shapes_[n.inputs[0]])) continue;
      Value& x = values_[n.inputs[0]];
      const ConvSpec& c = *n.conv;
      const auto after = [&](int axis, int64_t in, int64_t out) {
        const int64_t last = (out - 1) * c.stride[axis] + c.dilation[axis] * (c.kernel[axis] - 1) - c.padding[axis];
        return std::max<int64_t>(0, last - (in - 1));
      };
      x.halo.top = std::max(x.halo.top, c.padding[0]);
      x.halo.left = std::max(x.halo.left, c.padding[1]);
      x.halo.bottom = std::max(x.halo.bottom, after(0, x.height, values_[i].height));
      x.halo.right = std::max(x.halo.right, after(1, x.width, values_[i].width));
    }
    is_output_.resize(g_.nodes.size());
    for (int o : g_.outputs) ++is_output_[o];
  }

  // Operands of a concatenation are written where the concatenation wants them; a flattened pixel stays where it is.
  void choose_aliases() {
    for (int i = 0; i < count(); ++i) {
      const Node& n = g_.nodes[i];
      if (n.kind == Kind::kConcat) {
        int64_t first = 0;
        for (int x : n.inputs) {
          Value& v = values_[x];
          const bool once = std::count(n.inputs.begin(), n.inputs.end(), x) == 1;
          if (v.root == x && once && !is_parent_[x] && (v.height > 1 || v.width > 1 || v.halo == Halo{})) {
            v.root = i;
            v.first_channel = first;
            is_parent_[i] = true;
            Halo& h = values_[i].halo;
            h = {std::max(h.top, v.halo.top), std::max(h.left, v.halo.left), std::max(h.bottom, v.halo.bottom),
                 std::max(h.right, v.halo.right)};
          }
          first += v.channels;
        }
      } else if (n.kind == Kind::kFlatten) {
        const int x = n.inputs[0];
        if (values_[x].height == 1 && values_[x].width == 1 && values_[x].halo == Halo{} && values_[x].root == x) {
          values_[i].root = x;
          is_parent_[x] = true;
        }
      }
    }
    // A slice of a slice has no place of its own: such roots are followed once, and nothing deeper is made above.
    for (int i = 0; i < count(); ++i) {
      while (values_[values_[i].root].root != values_[i].root) {
        values_[i].first_channel += values_[values_[i].root].first_channel;
        values_[i].root = values_[values_[i].root].root;
      }
    }
    for (int i = 0; i < count(); ++i) {
      Value& r = values_[root(i)];
      r.born = std::min(r.born, i);
      r.dies = std::max(r.dies, i);
      for (int reader : readers_[i]) r.dies = std::max(r.dies, reader);
      if (is_output_[i]) r.dies = count();
    }
  }

  // Chunks of a stage run one after the other, so what is shared between stages lives for whole stages.
  void widen_shared_lives() {
    for (int i = 0; i < count(); ++i) {
      Value& v = values_[i];
      if (v.root != i || !v.crosses) continue;
      const int first = stage_[v.born], last = v.dies < count() ? stage_[v.dies] : 0;
      for (int j = 0; j < count(); ++j) {
        if (stage_[j] == first) v.born = std::min(v.born, j);
        if (v.dies < count() && stage_[j] == last) v.dies = std::max(v.dies, j);
      }
    }
  }

  // The linear layer wants rows of features on both sides.
  bool runs_as_linear(int i) const {
    const Node& n = g_.nodes[i];
    const auto rows = [&](int v) { return values_[root(v)].halo == Halo{}; };
    return as_linear(*n.conv, shapes_[n.inputs[0]]) && std::all_of(n.inputs.begin(), n.inputs.end(), rows) && rows(i);
  }

  // Whether planes can describe a tensor of the caller's as it is, but for its dtype.
  bool describes(const TensorView& t, const Value& v) const {
    if (v.halo != Halo{}) return false;
    for (int d = 0; d < t.dims; ++d) {
      if (t.strides[d] < 0) return false;
    }
    if (t.dims == 2) return v.height == 1 && v.width == 1 && (t.sizes[1] == 1 || t.strides[1] == 1);
    if (t.dims != 4) return false;
    if (v.height == 1 && v.width == 1) return t.sizes[1] == 1 || t.strides[1] == 1;
    const bool rows = t.sizes[2] == 1 || t.strides[2] >= t.sizes[3];
    return rows && (t.sizes[3] == 1 || t.strides[3] == 1);
  }

  // Whether an input without halo, as it is now, suits its only reader better than with the halo that it asks for, an
  // image at a time.
  bool takes_edges(int i) const {
    if (plan_.batch < 1 || readers_[i].size() != 1 || dtype_ != Dtype::kF32) return false;
    const int reader = readers_[i].front();
    if (plan_.batch > 1 && !wants_one_image(reader, plan_.batch)) return false;
    const Node& n = g_.nodes[reader];
    return n.kind == Kind::kConv && n.inputs[0] == i && !as_linear(*n.conv, shapes_[i]) &&
           weights_.conv(reader).takes_edges(plan_.batch, values_[i].height, values_[i].width);
  }

  // Whether the convolution that alone reads an input, or writes an output, takes f32 where the plan computes in bf16.
  bool reads_f32(int i, const TensorView& t) const {
    if (dtype_ != Dtype::kBf16 || t.dtype != Dtype::kF32 || readers_[i].size() != 1) return false;
    const int reader = readers_[i].front();
    const Node& n = g_.nodes[reader];
    const Value& v = values_[i];
    // Offsets in the tables of its kernels are 32 bits wide; an import has planes of its own.
    const bool rows =
        t.dims == 4 && t.strides[3] == 1 && t.strides[2] == t.sizes[3] && planes_of(t, v).readable < (int64_t{1} << 31);
    return rows && is_conv(reader) && n.inputs[0] == i && weights_.conv(reader).takes_f32(v.height, v.width);
  }
  bool writes_f32(int i, const TensorView& t) const {
    return dtype_ == Dtype::kBf16 && t.dtype == Dtype::kF32 && is_conv(i) && weights_.conv(i).gives_f32();
  }

  // A segment's input is read, and its output written, in place where nothing needs a copy.
  void choose_direct() {
    for (size_t k = 0; k < g_.inputs.size(); ++k) {
      Value& v = values_[g_.inputs[k]];
      input_of_[g_.inputs[k]] = static_cast<int>(k);
      // Depthwise kernels read whole vectors behind the rows, for which a caller's tensor has no room.
      const bool slack = std::any_of(readers_[g_.inputs[k]].begin(), readers_[g_.inputs[k]].end(), [&](int r) {
        const auto& conv = g_.nodes[r].conv;
        return conv && conv->groups > 1 && conv->groups == conv->in_channels;
      });
      const Halo halo = v.halo;
      const bool f32 = reads_f32(g_.inputs[k], in_[k]);
      v.halo = {};
      if (!f32 && !takes_edges(g_.inputs[k])) v.halo = halo;
      if ((f32 || in_[k].dtype == dtype_) && !slack && v.root == g_.inputs[k] && !is_parent_[g_.inputs[k]] &&
          !is_output_[g_.inputs[k]] && describes(in_[k], v)) {
        v.direct = true;
        v.padded = halo;
        v.operand = {.where = Operand::Where::kInput, .index = static_cast<int>(k)};
        v.planes = planes_of(in_[k], v);
        v.planes.past_caches = v.planes.readable * dtype_size(v.planes.dtype) > kPastCaches / 2;
      } else {
        v.halo = halo;
      }
    }
    for (size_t k = 0; k < g_.outputs.size(); ++k) {
      const int o = g_.outputs[k];
      Value& v = values_[o];
      const bool only = is_output_[o] == 1 && readers_[o].empty() && g_.nodes[o].kind != Kind::kInput;
      const bool overlaps = out_[k].strides[0] == 0 && out_[k].sizes[0] > 1;
      if (only && (out_[k].dtype == dtype_ || writes_f32(o, out_[k])) && v.root == o && !is_parent_[o] && !overlaps &&
          describes(out_[k], v)) {
        v.direct = true;
        v.operand = {.where = Operand::Where::kOutput, .index = static_cast<int>(k)};
        v.planes = planes_of(out_[k], v);
        v.planes.past_caches = v.planes.readable * dtype_size(v.planes.dtype) > kPastCaches;
      }
    }
  }

  Planes planes_of(const TensorView& t, const Value& v) const {
    Planes p{.dtype = t.dtype, .channels = v.channels, .height = v.height, .width = v.width, .halo = {}};
    p.image_stride = t.strides[0];
    p.channel_stride = t.strides[1];
    p.pitch = t.dims == 4 ? t.strides[2] : 1;
    if (v.height == 1 && v.width == 1) p.pitch = p.channel_stride = 1;
    p.readable = 1;
    for (int d = 0; d < t.dims; ++d) p.readable += std::max<int64_t>(0, t.sizes[d] - 1) * t.strides[d];
    return p;
  }

  bool is_conv(int i) const {
    const Node& n = g_.nodes[i];
    return n.kind == Kind::kConv && !as_linear(*n.conv, shapes_[n.inputs[0]]);
  }

  // Lanes of the convolution's planes, if its family has any; else 0.
  int64_t lanes_of(int i) const { return is_conv(i) ? weights_.conv(i).lanes() : 0; }

  // Images at a time that leave each lane a tile of the map.
  int64_t images_for_lanes(int i) const {
    constexpr int64_t kTile = 16;
    return div_up(kTile * lanes_of(i), values_[i].height * values_[i].width);
  }

  // Bytes of a value of one image.
  int64_t bytes(int v) const {
    const Value& x = values_[v];
    const int64_t rows = x.height + std::max(x.halo.top, x.halo.bottom);
    return x.channels * rows * (x.width + std::max(x.halo.left, x.halo.right)) * dtype_size(dtype_);
  }

  int64_t weight_bytes(int i) const {
    const Node& n = g_.nodes[i];
    if (lanes_of(i) > 0) {  // single weights, each with its place
      const auto& w = n.conv->weight;
      return 8 * static_cast<int64_t>(w.size() - std::count(w.begin(), w.end(), 0.0f));
    }
    if (const int64_t own = is_conv(i) ? weights_.conv(i).weight_bytes() : 0) return own;
    const auto size = n.conv ? n.conv->weight.size() : n.linear ? n.linear->weight.size() : 0;
    return static_cast<int64_t>(size) * dtype_size(dtype_);
  }

  int64_t node_bytes(int i) const {
    int64_t total = bytes(i);
    for (int x : g_.nodes[i].inputs) total += bytes(x);
    return total;
  }

  // What a node moves from beyond L2 for `share` images, n at a time, in bytes of weights: those for every chunk, and
  // what it reads and writes where a chunk's does not stay in L2.
  double moved(int i, int64_t weights, int64_t n, int64_t share) const {
    const int64_t activations = node_bytes(i), room = l2_bytes() * 9 / 20;
    const bool spills = n > 1 && n * activations > room;
    return static_cast<double>(weights) * static_cast<double>(div_up(share, n)) +
           (spills ? kWayBack * static_cast<double>(activations) * static_cast<double>(share) : 0.0);
  }

  // Sizes of equal chunks of `share` images.
  static std::vector<int64_t> chunk_sizes(int64_t share) {
    std::vector<int64_t> sizes;
    for (int64_t n = 1;; n = std::min(2 * n, share)) {
      const int64_t equal = div_up(share, div_up(share, n));
      if (sizes.empty() || equal > sizes.back()) sizes.push_back(equal);
      if (n == share) return sizes;
    }
  }

  // Whether a node by itself is best done image by image.
  bool wants_one_image(int i, int64_t share) const {
    const int64_t weights = weight_bytes(i);
    const double one = moved(i, weights, 1, share);
    const auto sizes = chunk_sizes(share);
    return images_for_lanes(i) <= 1 &&
           std::all_of(sizes.begin() + 1, sizes.end(), [&](int64_t n) { return moved(i, weights, n, share) > one; });
  }

  // Bytes of the values of one image that nodes before the i-th write and the i-th or later ones read.
  int64_t bytes_across(int i) const {
    int64_t all = 0;
    for (int v = 0; v < i; ++v) {
      if (values_[v].root == v && values_[v].born < i && values_[v].dies >= i) all += bytes(v);
    }
    return all;
  }

  // Consecutive nodes that go through as many images at a time are a stage; to change the number writes the batch out
  // and reads it again. Chosen so that all together move the least, node by node from the cheapest ways to come
  // there. Lanes that want more images than others do not follow: without them, every tile is too small (measured: a
  // third of the time of a map of 4 x 4).
  void cut_stages() {
    const int64_t share = std::max<int64_t>(1, div_up(plan_.batch, plan_.threads));
    const std::vector<int64_t> sizes = chunk_sizes(share);
    struct Way {
      double moved = std::numeric_limits<double>::infinity();
      size_t before = 0;  // the size of the node before
    };
    std::vector<std::vector<Way>> ways(g_.nodes.size(), std::vector<Way>(sizes.size()));
    for (int i = 0; i < count(); ++i) {
      const int64_t weights = weight_bytes(i), least = std::min(images_for_lanes(i), share);
      const double change = kWayBack * static_cast<double>(bytes_across(i)) * static_cast<double>(share);
      for (size_t k = 0; k < sizes.size(); ++k) {
        if (sizes[k] < least) continue;
        Way& way = ways[i][k];
        for (size_t b = 0; b < sizes.size(); ++b) {
          const double before = i == 0 ? 0 : ways[i - 1][b].moved + (b == k ? 0 : change);
          if (before <= way.moved) way = {before, b};
        }
        way.moved += moved(i, weights, sizes[k], share);
      }
    }
    std::vector<size_t> chosen(g_.nodes.size());
    for (int i = count() - 1; i >= 0; --i) {
      size_t& k = chosen[i];
      if (i + 1 < count()) {
        k = ways[i + 1][chosen[i + 1]].before;
      } else {
        for (size_t other = 0; other < sizes.size(); ++other) {
          if (ways[i][other].moved <= ways[i][k].moved) k = other;
        }
      }
    }
    stage_.resize(g_.nodes.size());
    for (int i = 0; i < count(); ++i) {
      if (i == 0 || chosen[i] != chosen[i - 1]) {
        plan_.stages.emplace_back();
        plan_.stages.back().images = sizes[chosen[i]];
      }
      stage_[i] = static_cast<int>(plan_.stages.size()) - 1;
    }
    // Where some chunk is not full, kernels planned for a full one may read on: there is room for that in the arena
    // only.
    for (const Stage& stage : plan_.stages) {
      const bool full = plan_.batch % plan_.threads == 0 && plan_.batch / plan_.threads % stage.images == 0;
      if (!full && plan_.batch > 0) extra_images_ = std::max(extra_images_, stage.images - 1);
    }
    for (Value& v : values_) {
      if (extra_images_ > 0 && v.direct && v.operand.where == Operand::Where::kInput) {
        v.direct = false;
        v.halo = v.padded;
      }
    }
    // The input's import joins its first reader: a stage of its own would write the batch out and read it again.
    const auto stage_of = [&](int i) {
      if (g_.nodes[i].kind != Kind::kInput || readers_[i].empty()) return stage_[i];
      return stage_[readers_[i].front()];
    };
    for (int i = 0; i < count(); ++i) stage_[i] = stage_of(i);
    for (int i = 0; i < count(); ++i) {
      Value& r = values_[root(i)];
      const int home = stage_[root(i)];
      bool crosses = stage_[i] != home;
      for (int reader : readers_[i]) crosses = crosses || stage_[reader] != home;
      // An export runs in the stage of the node whose value it gives.
      r.crosses = r.crosses || crosses;
    }
  }

  // What convolutions in lanes alone write and read, within a stage, stays in lanes: of all its images, or as few as
  // leave a tile to each lane of the smallest map.
  void choose_lanes() {
    for (int s = 0; s < static_cast<int>(plan_.stages.size()); ++s) {
      int64_t lanes = 0, least = 1;
      for (int i = 0; i < count(); ++i) {
        if (stage_[i] != s || lanes_of(i) == 0) continue;
        lanes = lanes_of(i);
        least = std::max(least, images_for_lanes(i));
      }
      if (lanes == 0) continue;
      Grid grid{.images = 1};
      while (grid.images < std::min({plan_.stages[s].images, least, lanes})) grid.images *= 2;
      for (int64_t left = lanes / grid.images; left > 1; left /= 2)
        (grid.rows < grid.cols ? grid.rows : grid.cols) *= 2;
      const auto in_lanes = [&](int i) {
        if (stage_[i] != s || lanes_of(i) == 0) return false;
        const Value &x = values_[g_.nodes[i].inputs[0]], &y = values_[i];
        return fits(grid, *g_.nodes[i].conv, {x.height, x.width}, {y.height, y.width});
      };
      for (int i = 0; i < count(); ++i) {
        Value& v = values_[i];
        const bool alone = v.root == i && !is_parent_[i] && !v.direct && !v.crosses && !is_output_[i];
        if (!alone || !in_lanes(i) || !std::all_of(readers_[i].begin(), readers_[i].end(), in_lanes)) continue;
        v.grid = grid;
        v.halo = {};
      }
    }
  }

  void lay_out() {
    for (int i = 0; i < count(); ++i) {
      Value& v = values_[i];
      if (v.root != i || v.direct) continue;
      const int64_t images = v.crosses ? plan_.batch + extra_images_ : plan_.stages[stage_[i]].images;
      v.planes = v.grid.images > 0 ? lane_planes(dtype_, images, v.channels, v.height, v.width, v.grid)
                                   : arena_planes(dtype_, images, v.channels, v.height, v.width, v.halo);
    }
    for (int i = 0; i < count(); ++i) {
      Value& v = values_[i];
      if (v.root == i) continue;
      const Value& r = values_[v.root];
      v.crosses = r.crosses;
      v.planes = r.planes;
      v.planes.channels = v.channels;
      v.planes.origin += v.first_channel * r.planes.channel_stride;
    }
  }

  // Places in the arenas, in order of birth. A value without halo goes to the lowest place that is free while it lives;
  // one with a halo to a place of the same planes whose tenant is dead, or to a new one.
  void place() {
    struct Place {
      int64_t offset, size;
      int dies;
    };
    struct Arena {
      std::vector<Place> plain;
      std::vector<std::pair<Planes, Place>> haloed;
    };
    Arena arenas[2];
    std::vector<int> order(g_.nodes.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values_[a].born < values_[b].born; });
    // Places with a halo lie behind those without, so their offsets are known last.
    int64_t haloed_size[2] = {0, 0}, plain_size[2] = {0, 0};
    std::vector<std::pair<int, bool>> placed;
    for (int i : order) {
      Value& v = values_[i];
      if (v.root != i || v.direct) continue;
      const int a = v.crosses ? 0 : 1;
      const int64_t size = div_up(v.planes.readable * dtype_size(dtype_), kPlace) * kPlace;
      v.operand.where = v.crosses ? Operand::Where::kShared : Operand::Where::kLocal;
      v.operand.image_bytes = v.crosses ? v.planes.image_stride * dtype_size(dtype_) : 0;
      // The residual of a convolution that is read for the last time may be overwritten in place, and without a halo
      // is: it comes into the cache but once, and nothing else is driven out.
      const auto residual = [&](const Place& p) { return p.dies == v.born && overwrites(i, p.offset, a); };
      if (v.halo == Halo{}) {
        placed.emplace_back(i, false);
        const auto found = std::find_if(arenas[a].plain.begin(), arenas[a].plain.end(), residual);
        if (found != arenas[a].plain.end()) {
          found->dies = v.dies;
          v.operand.offset = found->offset;
          continue;
        }
        std::vector<Place> busy;
        for (const Place& p : arenas[a].plain) {
          if (p.dies >= v.born) busy.push_back(p);
        }
        std::sort(busy.begin(), busy.end(), [](const Place& p, const Place& q) { return p.offset < q.offset; });
        int64_t offset = 0;
        for (const Place& p : busy) {
          if (offset + size <= p.offset) break;
          offset = std::max(offset, p.offset + p.size);
        }
        arenas[a].plain.push_back({offset, size, v.dies});
        plain_size[a] = std::max(plain_size[a], offset + size);
        v.operand.offset = offset;
        continue;
      }
      Place* found = nullptr;
      for (auto& [planes, p] : arenas[a].haloed) {
        if (planes == v.planes && (p.dies < v.born || residual(p))) found = &p;
      }
      if (!found) {
        arenas[a].haloed.push_back({v.planes, {haloed_size[a], size, 0}});
        haloed_size[a] += size;
        found = &arenas[a].haloed.back().second;
      }
      found->dies = v.dies;
      v.operand.offset = found->offset;
      placed.emplace_back(i, true);
    }
    for (auto [i, haloed] : placed) {
      if (haloed) values_[i].operand.offset += plain_size[values_[i].crosses ? 0 : 1];
    }
    plan_.shared_bytes = plain_size[0] + haloed_size[0];
    plan_.local_bytes = plain_size[1] + haloed_size[1];
    for (int i = 0; i < count(); ++i) {
      Value& v = values_[i];
      if (v.direct) {
        const auto& t = v.operand.where == Operand::Where::kInput ? in_[v.operand.index] : out_[v.operand.index];
        v.operand.image_bytes = t.strides[0] * dtype_size(t.dtype);
      } else if (v.root != i) {
        v.operand = values_[v.root].operand;
      }
    }
  }

  bool overwrites(int i, int64_t offset, int arena) const {
    const Node& n = g_.nodes[i];
    const bool adds =
        (n.kind == Kind::kConv || n.kind == Kind::kLinear || n.kind == Kind::kCopy) && n.inputs.size() == 2;
    if (!adds || n.inputs[0] == n.inputs[1]) return false;
    const Value& r = values_[n.inputs[1]];
    const bool mine =
        !r.direct && r.root == n.inputs[1] && (r.crosses ? 0 : 1) == arena && r.planes == values_[i].planes;
    return mine && r.operand.offset == offset && root(n.inputs[0]) != n.inputs[1];
  }

  // Planes for a chunk that may begin at any image of the batch, or where chunks are always full and larger than the
  // room behind the batch, at any that leaves it its images.
  Planes chunk_planes(int v, int64_t images) const {
    Planes p = values_[v].planes;
    const int64_t last = std::min(plan_.batch - 1, plan_.batch + extra_images_ - images);
    if (values_[v].operand.image_bytes != 0) p.readable -= std::max<int64_t>(0, last) * p.image_stride;
    return p;
  }

  void add(int node, std::unique_ptr<Step> step, std::vector<Operand> inputs, const Operand& output) {
    PlannedStep s{.node = node, .step = std::move(step), .inputs = std::move(inputs), .output = output, .bytes = 0};
    s.bytes = node_bytes(node);
    plan_.stages[stage_[node]].steps.push_back(std::move(s));
  }

  TensorView image_view(TensorView t, int64_t images) const {
    t.sizes[0] = images;
    return t;
  }

  // A caller's tensor [N, F] that holds a value {C, H, W}, or the other way round, in the value's own sizes.
  TensorView as_value(const TensorView& t, const Value& v) const {
    TensorView r = t;
    if (t.dims == 2) {
      r.dims = 4;
      r.sizes[1] = v.channels, r.sizes[2] = v.height, r.sizes[3] = v.width;
      r.strides[3] = t.strides[1], r.strides[2] = v.width * t.strides[1];
      r.strides[1] = v.height * v.width * t.strides[1];
    }
    return r;
  }

  // The channels of a value of the caller's that some convolution has a tap on, ascending. Empty: all, or a reader that
  // is no compacted convolution. (A depthwise kernel multiplies what it reads by zeros, and so does a linear one.)
  std::vector<int64_t> channels_read(int v) const {
    const Value& x = values_[v];
    std::vector<bool> read(static_cast<size_t>(x.channels), false);
    const auto parent = is_parent_.find(v);
    if (x.root != v || is_output_[v] || (parent != is_parent_.end() && parent->second)) {
      return {};
    }
    for (int r : readers_[v]) {
      const Node& n = g_.nodes[r];
      const bool residual = n.inputs.size() > 1 && n.inputs[1] == v;
      const bool rows = dtype_ == Dtype::kBf16 && n.kind == Kind::kConv && as_linear(*n.conv, shapes_[v]);
      if (n.kind != Kind::kConv || rows || residual || (n.conv->groups > 1 && n.conv->groups == n.conv->in_channels))
        return {};
      const ConvSpec& c = *n.conv;
      const int64_t positions = c.kernel[0] * c.kernel[1], group_channels = c.in_channels / c.groups;
      int64_t filter = 0;
      for (size_t b = 0; b < c.block_filters.size(); filter += c.block_filters[b++]) {
        const int64_t first = filter / (c.out_channels / c.groups) * group_channels;
        for (int32_t t = c.block_taps[b]; t < c.block_taps[b + 1]; ++t) {
          read[static_cast<size_t>(first + c.taps[static_cast<size_t>(t)] / positions)] = true;
        }
      }
    }
    std::vector<int64_t> channels;
    for (size_t i = 0; i < read.size(); ++i) {
      if (read[i]) channels.push_back(static_cast<int64_t>(i));
    }
    return channels.size() == read.size() ? std::vector<int64_t>{} : channels;
  }

  // Whether these channels (empty: all) of an input are so many that all are worth fetching.
  bool reads_most(int i, const std::vector<int64_t>& some) const {
    return some.empty() || 5 * static_cast<int64_t>(some.size()) >= 2 * values_[i].channels;
  }

  void plan_steps() {
    for (int i = 0; i < count(); ++i) {
      const Node& n = g_.nodes[i];
      const Value& y = values_[i];
      const int64_t images = plan_.stages[stage_[i]].images;
      const Planes to = chunk_planes(i, images);
      const auto from = [&](size_t k) { return chunk_planes(n.inputs[k], images); };
      const auto operand = [&](size_t k) { return values_[n.inputs[k]].operand; };
      std::vector<Operand> operands;
      for (size_t k = 0; k < n.inputs.size(); ++k) operands.push_back(operand(k));
      const bool adds = n.inputs.size() == 2;
      const Planes residual = adds ? from(1) : Planes{};
      const Planes* added = adds ? &residual : nullptr;
      switch (n.kind) {
        case Kind::kInput: {
          if (y.direct) break;
          const int k = input_of_.at(i);
          const Operand source{.where = Operand::Where::kInput,
                               .index = k,
                               .offset = 0,
                               .image_bytes = in_[k].strides[0] * dtype_size(in_[k].dtype)};
          const std::vector<int64_t> some = channels_read(i);
          add(i, import_step(image_view(as_value(in_[k], y), images), to, isa_, some), {source}, y.operand);
          plan_.stages[stage_[i]].steps.back().imports = reads_most(i, some);
          break;
        }
        case Kind::kConv:
          if (runs_as_linear(i)) {
            add(i, weights_.linear(i).plan(from(0), to, added, images), operands, y.operand);
          } else {
            add(i, weights_.conv(i).plan(from(0), to, added, images), operands, y.operand);
            plan_.stages[stage_[i]].steps.back().imports =
                operands[0].where == Operand::Where::kInput && reads_most(n.inputs[0], channels_read(n.inputs[0]));
          }
          break;
        case Kind::kLinear:
          add(i, weights_.linear(i).plan(from(0), to, added, images), operands, y.operand);
          break;
        case Kind::kPool:
          add(i, pool_step(from(0), to, n.pool, images, isa_), operands, y.operand);
          break;
        case Kind::kAdaptivePool:
          add(i, adaptive_pool_step(from(0), to, n.pool.max, images, isa_), operands, y.operand);
          break;
        case Kind::kCopy:
          add(i, copy_step(from(0), to, added, n.epilogue, images, isa_), operands, y.operand);
          break;
        case Kind::kMultiply:
          add(i, multiply_step(from(0), from(1), to, n.epilogue, images, isa_), operands, y.operand);
          break;
        case Kind::kScaleShift:
          add(i, scale_shift_step(from(0), to, n.scale, n.shift, n.epilogue, images, isa_), operands, y.operand);
          break;
        case Kind::kConcat: {
          int64_t first = 0;
          for (size_t k = 0; k < n.inputs.size(); ++k) {
            const Value& x = values_[n.inputs[k]];
            if (x.root != root(i) || x.first_channel != y.first_channel + first) {
              Planes slice = to;
              slice.channels = x.channels;
              slice.origin += first * to.channel_stride;
              add(i, copy_step(from(k), slice, nullptr, Epilogue{}, images, isa_), {operands[k]}, y.operand);
            }
            first += x.channels;
          }
          break;
        }
        case Kind::kFlatten:
          if (root(i) == root(n.inputs[0])) break;
          add(i, flatten_step(from(0), to, images, isa_), operands, y.operand);
          break;
      }
      for (size_t k = 0; k < g_.outputs.size(); ++k) {
        if (g_.outputs[k] != i || (y.direct && y.operand.where == Operand::Where::kOutput)) continue;
        const Operand target{.where = Operand::Where::kOutput,
                             .index = static_cast<int>(k),
                             .offset = 0,
                             .image_bytes = out_[k].strides[0] * dtype_size(out_[k].dtype)};
        add(i, export_step(to, image_view(as_value(out_[k], y), images), images, isa_), {y.operand}, target);
      }
    }
    std::erase_if(plan_.stages, [](const Stage& s) { return s.steps.empty(); });
  }

  const Graph& g_;
  const std::vector<std::vector<int64_t>>& shapes_;
  const std::vector<TensorView>&in_, &out_;
  const Dtype dtype_;
  const Isa isa_;
  const Weights& weights_;
  Plan plan_;
  std::vector<Value> values_;
  std::vector<std::vector<int>> readers_;
  std::vector<int> is_output_, stage_;
  std::map<int, bool> is_parent_;
  std::map<int, int> input_of_;
  int64_t extra_images_ = 0;  // behind the batch in the shared arena
};

}  // namespace

bool as_linear(const ConvSpec& c, const std::vector<int64_t>& x) {
  return x.size() == 3 && x[1] == 1 && x[2] == 1 && c.groups == 1 && c.kernel[0] == 1 && c.kernel[1] == 1 &&
         c.padding[0] == 0 && c.padding[1] == 0;
}

Plan make_plan(const Graph& graph, const std::vector<std::vector<int64_t>>& shapes,
               const std::vector<TensorView>& inputs, const std::vector<TensorView>& outputs, Dtype dtype, Isa isa,
               int threads, const Weights& weights) {
  return Planner(graph, shapes, inputs, outputs, dtype, isa, threads, weights).make();
}

}  // namespace structadmm::runtime
