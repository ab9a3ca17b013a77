// The public C++ API (include/structadmm/engine.h) over the runtime.
#include "structadmm/engine.h"

#include <algorithm>
#include <optional>

#include "base/check.h"
#include "base/isa.h"
#include "base/parallel.h"
#include "runtime/load.h"

namespace structadmm {
namespace {

constexpr auto kOp = "Engine";

Dtype dtype_of(DataType dtype) {
  return dtype == DataType::kBfloat16 ? Dtype::kBf16 : dtype == DataType::kFloat16 ? Dtype::kF16 : Dtype::kF32;
}

runtime::EngineOptions options_of(const Options& o) {
  runtime::EngineOptions options{.dtype = dtype_of(o.dtype), .isa = std::nullopt};
  SADMM_CHECK(o.threads >= 0 && o.threads <= 1024, kOp, ": threads got ", o.threads, ", wanted 0 to 1024");
  if (!o.isa.empty()) {
    options.isa = isa_from_name(o.isa);
    SADMM_CHECK(options.isa && isa_supported(*options.isa), kOp, ": isa got '", o.isa,
                "', wanted one of supported_isas");
  }
  return options;
}

TensorView view_of(const char* name, void* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   DataType dtype) {
  TensorView v;
  v.data = data;
  v.dtype = dtype_of(dtype);
  SADMM_CHECK(sizes.size() <= kMaxDims && (strides.empty() || strides.size() == sizes.size()), kOp, ": ", name, " got ",
              sizes.size(), " sizes and ", strides.size(), " strides, wanted at most ", kMaxDims,
              " of both, or no strides");
  v.dims = static_cast<int>(sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    SADMM_CHECK(sizes[d] >= 0 && sizes[d] < int64_t{1} << 31 && next < int64_t{1} << 40, kOp, ": ", name, " got size ",
                sizes[d], ", wanted fewer values");
    v.sizes[d] = sizes[d];
    v.strides[d] = strides.empty() ? next : strides[d];
    next *= std::max<int64_t>(sizes[d], 1);
  }
  return v;
}

runtime::Loaded checked(const std::vector<std::byte>& bytes, const std::string& file, const Options& options) {
  return runtime::load(bytes, std::string(kOp) + ": " + file, options_of(options));
}

}  // namespace

struct Engine::State {
  runtime::Loaded loaded;
  std::unique_ptr<ThreadPool> pool;

  State(runtime::Loaded l, int threads) : loaded(std::move(l)) {
    if (threads > 0) pool = std::make_unique<ThreadPool>(threads);
  }
  Parallel& parallel() const { return pool ? *pool : ThreadPool::global(); }
};

Engine::Engine(const std::string& path, const Options& options)
    : state_(std::make_unique<State>(checked(format::read_file(path), path, options), options.threads)) {}

Engine::Engine(const void* data, size_t size, const Options& options)
    : state_(std::make_unique<State>(
          runtime::load({static_cast<const std::byte*>(data), size}, "Engine: artefact", options_of(options)),
          options.threads)) {}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

size_t Engine::inputs() const {
  return state_->loaded.engine.graph().inputs.size();
}
size_t Engine::outputs() const {
  return state_->loaded.engine.graph().outputs.size();
}

std::vector<std::vector<int64_t>> Engine::input_sizes() const {
  std::vector<std::vector<int64_t>> sizes;
  for (const format::Input& i : state_->loaded.inputs) sizes.push_back(i.shape);
  return sizes;
}

const std::string& Engine::metadata() const {
  return state_->loaded.metadata;
}

std::vector<std::vector<int64_t>> Engine::output_sizes(const std::vector<std::vector<int64_t>>& input_sizes) const {
  std::vector<TensorView> in;
  for (const auto& sizes : input_sizes) in.push_back(view_of("input", nullptr, sizes, {}, DataType::kFloat32));
  return state_->loaded.engine.output_sizes(in);
}

void Engine::run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
  std::vector<TensorView> in, out;
  for (const Tensor& t : inputs) in.push_back(view_of("input", t.data, t.sizes, t.strides, t.dtype));
  for (const Tensor& t : outputs) out.push_back(view_of("output", t.data, t.sizes, t.strides, t.dtype));
  state_->loaded.engine.run(in, out, state_->parallel());
}

std::vector<float> Engine::run(const float* input, const std::vector<int64_t>& sizes) const {
  SADMM_CHECK(inputs() == 1 && outputs() == 1, kOp, ": network got ", inputs(), " inputs and ", outputs(),
              " outputs, wanted one of each");
  const std::vector<int64_t> out = output_sizes({sizes})[0];
  int64_t n = 1;
  for (const int64_t s : out) n *= s;
  std::vector<float> y(static_cast<size_t>(n));
  run({{const_cast<float*>(input), sizes, {}, DataType::kFloat32}}, {{y.data(), out, {}, DataType::kFloat32}});
  return y;
}

const char* version() {
  return SADMM_VERSION;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kAllIsas) {
    if (isa_supported(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

}  // namespace structadmm
