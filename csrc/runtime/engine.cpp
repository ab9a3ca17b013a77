#include "runtime/engine.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <utility>

#include "base/ahead.h"
#include "base/check.h"
#include "runtime/fuse.h"
#include "runtime/planner.h"

namespace structadmm::runtime {
namespace {

constexpr size_t kPlans = 8;  // kept for the shapes used last
constexpr int kMaxOperands = 2;

// Zeroed memory on huge pages: taps of a convolution lie in many planes, hence on many small pages.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    if (bytes == 0) return;
    constexpr size_t kHuge = 2 << 20;
    const size_t line = static_cast<size_t>(bytes) >= kHuge / 2 ? kHuge : 64;
    const size_t size = (static_cast<size_t>(bytes) + line - 1) / line * line;
    data_ = static_cast<std::byte*>(std::aligned_alloc(line, size));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (line == kHuge) madvise(data_, size, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, size);
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { std::free(data_); }
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
};

// The memory of one run.
struct Arenas {
  Memory shared;
  std::vector<Memory> local;  // one per thread
  Arenas(const Plan& plan, int threads) : shared(plan.shared_bytes) {
    for (int t = 0; t < threads; ++t) local.emplace_back(plan.local_bytes);
  }
};

struct Key {
  std::vector<TensorView> tensors;  // without pointers
  size_t inputs = 0;
  int threads = 1;
};

bool same(const TensorView& a, const TensorView& b) {
  if (a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d) {
    if (a.sizes[d] != b.sizes[d] || a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

bool matches(const Key& key, std::span<const TensorView> in, std::span<const TensorView> out, int threads) {
  if (key.threads != threads || key.inputs != in.size() || key.tensors.size() != in.size() + out.size()) return false;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!same(key.tensors[i], in[i])) return false;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (!same(key.tensors[in.size() + i], out[i])) return false;
  }
  return true;
}

// A plan and the arenas that wait for its next run.
struct Prepared {
  Key key;
  Plan plan;
  std::mutex mutex;
  std::vector<std::unique_ptr<Arenas>> idle;

  std::unique_ptr<Arenas> take() {
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) {
        auto arenas = std::move(idle.back());
        idle.pop_back();
        return arenas;
      }
    }
    return std::make_unique<Arenas>(plan, plan.threads);
  }
  void give(std::unique_ptr<Arenas> arenas) {
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(arenas));
  }
};

bool is_float(Dtype d) {
  return d == Dtype::kF32 || d == Dtype::kBf16 || d == Dtype::kF16;
}

LinearSpec as_linear_spec(const ConvSpec& c) {
  return {.in_features = c.in_channels,
          .out_features = c.out_channels,
          .weight = c.weight,
          .bias = c.bias,
          .taps = c.taps,
          .block_filters = c.block_filters,
          .block_taps = c.block_taps,
          .epilogue = c.epilogue};
}

// Whether so many of the stored weights are zero that single weights should run faster than taps. Half is an estimate:
// from densities 0.05 to 0.3 of a ResNet-18/CIFAR, the two would meet near 0.8. optimize measures it per layer.
bool scattered(const ConvSpec& c) {
  const auto zeros = std::count(c.weight.begin(), c.weight.end(), 0.0f);
  return 2 * zeros > static_cast<int64_t>(c.weight.size());
}

std::string family_of(const Node& n, Dtype dtype) {
  if (!n.family.empty()) return n.family;
  const ConvSpec& c = *n.conv;
  if (c.groups > 1 && c.groups == c.in_channels) return "depthwise";
  return dtype == Dtype::kF32 && scattered(c) ? "nonzeros" : "taps";
}

std::shared_ptr<const PackedConv> pack_conv(const Node& n, const std::string& family, Dtype dtype, Isa isa) {
  const ConvSpec& c = *n.conv;
  if (family == "depthwise") return pack_conv_depthwise(c, dtype, isa);
  if (family == "nonzeros" && dtype == Dtype::kF32) return pack_conv_nonzeros(c, isa);
  SADMM_CHECK(family == "taps" || family == "nonzeros" || family == "winograd", "engine: ", n.name, ": family got '",
              n.family, "', wanted taps, winograd, depthwise or nonzeros");
  return dtype == Dtype::kBf16 ? pack_conv_taps_bf16(c, isa) : pack_conv_taps_f32(c, isa);
}

// Whether a convolution with outputs of these sizes runs by Winograd's algorithm: asked for, or where it pays.
bool by_winograd(const Node& n, const std::string& family, Dtype dtype, const std::vector<int64_t>& y, Isa isa) {
  if (!winograd_holds(dtype, isa) || y.size() != 3) return false;
  // A file's choice was measured in f32.
  const bool asked = !n.family.empty() && family == "winograd" && can_winograd(*n.conv);
  if (asked && dtype == Dtype::kF32) return true;
  return (asked || (n.family.empty() && family == "taps")) && winograd_pays(*n.conv, y[1], y[2], dtype, isa);
}

}  // namespace

struct Engine::State {
  Graph graph;
  EngineOptions options;
  Isa isa;
  std::vector<std::string> families;  // of convolutions: a plan asks often, and counting the zeros takes a while

  std::mutex mutex;  // guards what follows
  std::deque<std::shared_ptr<Prepared>> plans;
  std::vector<std::shared_ptr<const PackedConv>> convs, winograds;
  std::vector<std::shared_ptr<const PackedLinear>> linears;

  std::vector<std::vector<int64_t>> shapes(std::span<const TensorView> inputs) const {
    SADMM_CHECK(inputs.size() == graph.inputs.size(), "engine: inputs got ", inputs.size(), " tensors, wanted ",
                graph.inputs.size());
    std::vector<std::vector<int64_t>> each;
    for (const TensorView& x : inputs) {
      SADMM_CHECK(is_float(x.dtype), "engine: input got ", dtype_name(x.dtype), ", wanted f32, bf16 or f16");
      SADMM_CHECK(x.device == Device::kCpu, "engine: input got a tensor on another device, wanted the CPU");
      SADMM_CHECK(x.dims == 2 || x.dims == 4, "engine: input got shape ", x.shape(),
                  ", wanted [batch, channels, height, width] or [batch, features]");
      SADMM_CHECK(x.sizes[0] == inputs[0].sizes[0], "engine: inputs got batches of ", inputs[0].sizes[0], " and ",
                  x.sizes[0], ", wanted the same");
      for (int d = 1; d < x.dims; ++d) {
        SADMM_CHECK(x.sizes[d] >= 1 && x.sizes[d] < (int64_t{1} << 28), "engine: input got shape ", x.shape(),
                    ", wanted sizes of at least 1");
      }
      each.emplace_back(x.sizes + 1, x.sizes + x.dims);
    }
    return infer_shapes(graph, each);
  }

  std::vector<std::vector<int64_t>> outputs(std::span<const TensorView> inputs) const {
    const auto all = shapes(inputs);
    std::vector<std::vector<int64_t>> sizes;
    for (int o : graph.outputs) {
      std::vector<int64_t> s{inputs[0].sizes[0]};
      s.insert(s.end(), all[o].begin(), all[o].end());
      sizes.push_back(std::move(s));
    }
    return sizes;
  }

  // Packed for outputs of these sizes.
  const PackedConv& conv(int node, const std::vector<int64_t>& y) {
    const Node& n = graph.nodes[node];
    const std::string& family = families[node];
    const bool winograd = by_winograd(n, family, options.dtype, y, isa);
    auto& packed = (winograd ? winograds : convs)[node];
    if (!packed) packed = winograd ? pack_conv_winograd(*n.conv, isa) : pack_conv(n, family, options.dtype, isa);
    return *packed;
  }

  const PackedLinear& linear(int node) {
    auto& packed = linears[node];
    const Node& n = graph.nodes[node];
    if (!packed) packed = pack_linear(n.linear ? *n.linear : as_linear_spec(*n.conv), options.dtype, isa);
    return *packed;
  }

  std::shared_ptr<Prepared> prepared(std::span<const TensorView> in, std::span<const TensorView> out, int threads) {
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < plans.size(); ++i) {
      if (!matches(plans[i]->key, in, out, threads)) continue;
      auto found = plans[i];
      if (i > 0) {
        plans.erase(plans.begin() + static_cast<int64_t>(i));
        plans.push_front(found);
      }
      return found;
    }
    const auto all = shapes(in);
    SADMM_CHECK(out.size() == graph.outputs.size(), "engine: outputs got ", out.size(), " tensors, wanted ",
                graph.outputs.size());
    for (size_t k = 0; k < out.size(); ++k) {
      const auto& wanted = all[graph.outputs[k]];
      const TensorView& y = out[k];
      bool fits = y.dims == static_cast<int>(wanted.size()) + 1 && y.sizes[0] == in[0].sizes[0];
      for (int d = 1; fits && d < y.dims; ++d) fits = y.sizes[d] == wanted[d - 1];
      SADMM_CHECK(fits, "engine: output ", k, " got shape ", y.shape(), ", wanted that of output_sizes");
      SADMM_CHECK(is_float(y.dtype) && y.device == Device::kCpu, "engine: output ", k, " got ", dtype_name(y.dtype),
                  ", wanted f32, bf16 or f16 on the CPU");
    }
    auto made = std::make_shared<Prepared>();
    made->key.inputs = in.size();
    made->key.threads = threads;
    std::vector<TensorView> ins(in.begin(), in.end()), outs(out.begin(), out.end());
    for (auto* views : {&ins, &outs}) {
      for (TensorView& t : *views) t.data = nullptr;
      made->key.tensors.insert(made->key.tensors.end(), views->begin(), views->end());
    }
    made->plan = make_plan(graph, all, ins, outs, options.dtype, isa, threads,
                           {.conv = [&](int n) -> const PackedConv& { return conv(n, all[n]); },
                            .linear = [this](int n) -> const PackedLinear& { return linear(n); }});
    plans.push_front(made);
    if (plans.size() > kPlans) plans.pop_back();
    return made;
  }
};

namespace {

struct Call {
  std::span<const TensorView> in, out;
  const Arenas* arenas;

  std::byte* find(const Operand& o, int64_t image, int thread) const {
    std::byte* base = nullptr;
    switch (o.where) {
      case Operand::Where::kInput:
        base = static_cast<std::byte*>(in[o.index].data);
        break;
      case Operand::Where::kOutput:
        base = static_cast<std::byte*>(out[o.index].data);
        break;
      case Operand::Where::kShared:
        base = arenas->shared.data();
        break;
      case Operand::Where::kLocal:
        base = arenas->local[thread].data();
        break;
    }
    return base + o.offset + image * o.image_bytes;
  }

  // What the stage's first step reads of the images from `image` on, as many as a chunk has; empty where there is none.
  Ahead next_chunk(const Stage& stage, int64_t image, int64_t end) const {
    const PlannedStep& s = stage.steps.front();
    if (!s.imports || image >= end) return {};
    const std::byte* const at = find(s.inputs[0], image, 0);
    return {at, at + std::min(stage.images, end - image) * s.inputs[0].image_bytes};
  }

  void step(const PlannedStep& s, int64_t image, int64_t images, int thread, Parallel& parallel) const {
    const void* inputs[kMaxOperands];
    for (size_t i = 0; i < s.inputs.size(); ++i) inputs[i] = find(s.inputs[i], image, thread);
    s.step->run({inputs, s.inputs.size()}, find(s.output, image, thread), images, parallel);
  }
};

// Images of the batch that a thread takes.
struct Share {
  int64_t begin, end;
};
Share share_of(int64_t batch, int thread, int threads) {
  return {batch * thread / threads, batch * (thread + 1) / threads};
}

void run_stage(const Stage& stage, const Plan& plan, const Call& call, Parallel& parallel) {
  const auto chunks = [&](Share share, int thread, Parallel& p) {
    for (int64_t i = share.begin; i < share.end; i += stage.images) {
      const int64_t images = std::min(stage.images, share.end - i);
      const Ahead next = call.next_chunk(stage, i + stage.images, share.end);
      for (const PlannedStep& s : stage.steps) {
        fetch_ahead = &s == &stage.steps.back() ? next : Ahead{};
        call.step(s, i, images, thread, p);
      }
    }
  };
  if (plan.threads > 1 && plan.batch >= plan.threads) {
    parallel.run(plan.threads, [&](int64_t t) {
      Serial serial;
      chunks(share_of(plan.batch, static_cast<int>(t), plan.threads), static_cast<int>(t), serial);
    });
  } else {
    chunks({0, plan.batch}, 0, parallel);
  }
}

}  // namespace

Engine::Engine(Graph graph, EngineOptions options) : state_(std::make_unique<State>()) {
  SADMM_CHECK(options.dtype == Dtype::kF32 || options.dtype == Dtype::kBf16, "engine: dtype got ",
              dtype_name(options.dtype), ", wanted f32 or bf16");
  SADMM_CHECK(!graph.inputs.empty() && !graph.outputs.empty(), "engine: graph got no input or no output, wanted both");
  // A bf16 panel is gathered pixel by pixel anyway.
  state_->graph = subsample_first(std::move(graph), [&](const Node& n) {
    return options.dtype == Dtype::kBf16 || family_of(n, options.dtype) == "nonzeros";
  });
  state_->options = options;
  state_->isa = options.isa.value_or(current_isa());
  // Also asks the system for the tile registers, where the instruction set has them.
  SADMM_CHECK(isa_supported(state_->isa), "engine: isa got ", isa_name(state_->isa), ", which this CPU lacks");
  for (const Node& n : state_->graph.nodes) {
    state_->families.push_back(n.kind == Kind::kConv ? family_of(n, options.dtype) : "");
  }
  state_->convs.resize(state_->graph.nodes.size());
  state_->winograds.resize(state_->graph.nodes.size());
  state_->linears.resize(state_->graph.nodes.size());
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;

const Graph& Engine::graph() const {
  return state_->graph;
}

const EngineOptions& Engine::options() const {
  return state_->options;
}

std::vector<std::vector<int64_t>> Engine::output_sizes(std::span<const TensorView> inputs) const {
  return state_->outputs(inputs);
}

void Engine::run(std::span<const TensorView> inputs, std::span<const TensorView> outputs, Parallel& parallel) const {
  const auto prepared = state_->prepared(inputs, outputs, std::max(1, parallel.threads()));
  if (prepared->plan.batch == 0) return;
  auto arenas = prepared->take();
  const Call call{inputs, outputs, arenas.get()};
  for (const Stage& stage : prepared->plan.stages) run_stage(stage, prepared->plan, call, parallel);
  prepared->give(std::move(arenas));
}

namespace {

// Contiguous f32 outputs for a question about a plan.
std::vector<TensorView> stand_ins(const std::vector<std::vector<int64_t>>& sizes) {
  std::vector<TensorView> views;
  for (const auto& s : sizes) {
    TensorView v;
    v.dtype = Dtype::kF32;
    v.dims = static_cast<int>(s.size());
    int64_t next = 1;
    for (int d = v.dims; d-- > 0; next *= s[d]) v.sizes[d] = s[d], v.strides[d] = next;
    views.push_back(v);
  }
  return views;
}

}  // namespace

std::vector<Engine::StepInfo> Engine::describe(std::span<const TensorView> inputs) const {
  const auto out = stand_ins(state_->outputs(inputs));
  const auto prepared = state_->prepared(inputs, out, 1);
  std::vector<StepInfo> infos;
  for (const Stage& stage : prepared->plan.stages) {
    for (const PlannedStep& s : stage.steps) {
      infos.push_back({state_->graph.nodes[s.node].name, s.step->kernel(), stage.images, s.bytes});
    }
  }
  return infos;
}

int64_t Engine::arena_bytes(std::span<const TensorView> inputs) const {
  const auto out = stand_ins(state_->outputs(inputs));
  const Plan& plan = state_->prepared(inputs, out, 1)->plan;
  return plan.shared_bytes + plan.local_bytes;
}

std::vector<double> Engine::profile(std::span<const TensorView> inputs, std::span<const TensorView> outputs,
                                    int repeats, Parallel& parallel) const {
  using Clock = std::chrono::steady_clock;
  const auto prepared = state_->prepared(inputs, outputs, 1);
  const Plan& plan = prepared->plan;
  auto arenas = prepared->take();
  const Call call{inputs, outputs, arenas.get()};
  std::vector<double> best;
  for (int r = 0; r < std::max(1, repeats); ++r) {
    std::vector<double> seconds;
    for (const Stage& stage : plan.stages) {
      const size_t first = seconds.size();
      seconds.resize(first + stage.steps.size(), 0.0);
      for (int64_t i = 0; i < plan.batch; i += stage.images) {
        const int64_t images = std::min(stage.images, plan.batch - i);
        const Ahead next = call.next_chunk(stage, i + stage.images, plan.batch);
        for (size_t s = 0; s < stage.steps.size(); ++s) {
          fetch_ahead = s + 1 == stage.steps.size() ? next : Ahead{};
          const auto start = Clock::now();
          call.step(stage.steps[s], i, images, 0, parallel);
          seconds[first + s] += std::chrono::duration<double>(Clock::now() - start).count();
        }
      }
    }
    if (best.empty()) best = seconds;
    for (size_t s = 0; s < best.size(); ++s) best[s] = std::min(best[s], seconds[s]);
  }
  prepared->give(std::move(arenas));
  return best;
}

}  // namespace structadmm::runtime
