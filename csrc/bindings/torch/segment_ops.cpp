// run_segment: a subgraph of a network, given as the bytes of its artefact, in one call. Engines are made at the first
// call with some bytes and kept; calls after that find theirs by address and digest.
#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/isa.h"
#include "base/large_blocks.h"
#include "bindings/torch/adapter.h"
#include "runtime/load.h"

namespace structadmm::bindings {
namespace {

constexpr auto kOp = "run_segment";
// Engines kept: more segments than any network has, few enough that those of networks long gone do not pile up.
constexpr size_t kEngines = 256;
constexpr size_t kDigest = 64;

struct Segment {
  std::string digest, dtype;
  Isa isa;
  runtime::Engine engine;
};

std::span<const std::byte> bytes_of(const Tensor& program) {
  SADMM_CHECK(
      program.scalar_type() == ScalarType::Byte && program.is_cpu() && program.is_contiguous() && program.dim() == 1,
      kOp, ": program got another tensor, wanted the bytes of an artefact, uint8 on the CPU");
  return {static_cast<const std::byte*>(program.data_ptr()), static_cast<size_t>(program.numel())};
}

// The engines of this process, used last first.
std::shared_ptr<const Segment> find_or_load(std::span<const std::byte> program, const std::string& dtype, Isa isa) {
  static std::mutex mutex;
  static std::list<std::shared_ptr<const Segment>> kept;
  const std::string digest = format::claimed_digest(program);
  const std::lock_guard lock(mutex);
  for (auto it = kept.begin(); it != kept.end(); ++it) {
    if ((*it)->digest == digest && (*it)->dtype == dtype && (*it)->isa == isa) {
      kept.splice(kept.begin(), kept, it);
      return kept.front();
    }
  }
  SADMM_CHECK(dtype == "float32" || dtype == "bfloat16", kOp, ": dtype got '", dtype, "', wanted float32 or bfloat16");
  const runtime::EngineOptions options{.dtype = dtype == "bfloat16" ? Dtype::kBf16 : Dtype::kF32, .isa = isa};
  runtime::Loaded loaded = runtime::load(program, std::string(kOp) + ": program", options);
  kept.push_front(std::make_shared<const Segment>(std::move(loaded.digest), dtype, isa, std::move(loaded.engine)));
  if (kept.size() > kEngines) kept.pop_back();
  return kept.front();
}

// What the last call of this thread with a program at some address found.
struct Found {
  const std::byte* data = nullptr;
  size_t size = 0, digest_at = 0;
  std::shared_ptr<const Segment> segment;
  // Outputs for inputs of these sizes.
  std::vector<int64_t> in_sizes;
  std::vector<std::vector<int64_t>> out_sizes;

  // Memory is used again, so the address alone says nothing.
  bool is(std::span<const std::byte> program, const std::string& dtype, Isa isa) const {
    return data == program.data() && size == program.size() && segment && segment->isa == isa &&
           segment->dtype == dtype && std::memcmp(program.data() + digest_at, segment->digest.data(), kDigest) == 0;
  }
};

Found& find(std::span<const std::byte> program, const std::string& dtype) {
  thread_local std::array<Found, 32> recent;
  const auto address = reinterpret_cast<uintptr_t>(program.data());
  Found& found = recent[(address / 64 ^ address / 8192) % recent.size()];
  const Isa isa = current_isa();
  if (found.is(program, dtype, isa)) return found;
  found = Found{};
  auto segment = find_or_load(program, dtype, isa);
  const auto* base = reinterpret_cast<const char*>(program.data());
  const std::string_view text(base, program.size());
  found.digest_at = text.find(segment->digest);
  found.data = program.data();
  found.size = program.size();
  found.segment = std::move(segment);
  return found;
}

const std::vector<std::vector<int64_t>>& output_sizes(Found& found, std::span<const TensorView> in) {
  size_t n = 0;
  bool same = !found.out_sizes.empty();
  for (const TensorView& v : in) {
    for (int d = -1; d < v.dims; ++d, ++n) {
      same = same && n < found.in_sizes.size() && found.in_sizes[n] == (d < 0 ? v.dims : v.sizes[d]);
    }
  }
  if (same && n == found.in_sizes.size()) return found.out_sizes;
  found.out_sizes = found.segment->engine.output_sizes(in);
  found.in_sizes.clear();
  for (const TensorView& v : in) {
    for (int d = -1; d < v.dims; ++d) found.in_sizes.push_back(d < 0 ? v.dims : v.sizes[d]);
  }
  return found.out_sizes;
}

int32_t type_of(Dtype dtype) {
  return dtype == Dtype::kBf16  ? aoti_torch_dtype_bfloat16()
         : dtype == Dtype::kF16 ? aoti_torch_dtype_float16()
                                : aoti_torch_dtype_float32();
}

// A tensor of so many bytes that gives its memory back to LargeBlocks. Its storage can't grow.
Tensor large_tensor(std::span<const int64_t> sizes, std::span<const int64_t> strides, Dtype dtype, int64_t bytes) {
  const LargeBlocks::Block block = LargeBlocks::instance().take(bytes);
  SADMM_CHECK(block.data, kOp, ": sizes got no memory, wanted ", bytes, " bytes for the output");
  const auto free = [](void* data, void* size) {
    LargeBlocks::instance().give({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(size))});
  };
  AtenTensorHandle handle = nullptr;
  const auto status =
      torch_from_blob(block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, type_of(dtype),
                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, free,
                      reinterpret_cast<void*>(static_cast<intptr_t>(block.bytes)));
  if (status != 0) LargeBlocks::instance().give(block);
  SADMM_CHECK(status == 0, kOp, ": sizes got no tensor, wanted one for the output");
  return Tensor(handle);
}

// Contiguous, through the C shim, which finds no op by its name.
Tensor empty(std::span<const int64_t> sizes, Dtype dtype) {
  int64_t strides[kMaxDims], next = 1;
  for (size_t d = sizes.size(); d-- > 0; next *= std::max<int64_t>(sizes[d], 1)) strides[d] = next;
  const bool any = std::find(sizes.begin(), sizes.end(), 0) == sizes.end();
  if (any && next * dtype_size(dtype) >= LargeBlocks::kLarge) {
    return large_tensor(sizes, {strides, sizes.size()}, dtype, next * dtype_size(dtype));
  }
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                               type_of(dtype), aoti_torch_device_type_cpu(), 0, &handle);
  SADMM_CHECK(status == 0, kOp, ": sizes got no memory, wanted room for the output");
  return Tensor(handle);
}

std::vector<Tensor> run_segment(std::vector<Tensor> inputs, Tensor program, std::string dtype, std::string /*shapes*/) {
  SADMM_CHECK(!inputs.empty(), kOp, ": inputs got none, wanted at least one");
  Found& found = find(bytes_of(program), dtype);
  std::vector<TensorView> in, out;
  for (const Tensor& x : inputs) in.push_back(view_of(kOp, "input", x));
  std::vector<Tensor> outputs;
  for (const auto& sizes : output_sizes(found, in)) {
    outputs.push_back(empty(sizes, in[0].dtype));
    out.push_back(view_of(kOp, "output", outputs.back()));
  }
  // Kept alive by this call: a task of torch's pool may run another segment on this thread, in the same place.
  const auto segment = found.segment;
  TorchParallel parallel;
  segment->engine.run(in, out, parallel);
  return outputs;
}

// As run_segment with one input and one output, in half the time: no lists and no strings are made.
Tensor run_segment_1(Tensor x, Tensor program, bool bf16) {
  static const std::string dtypes[]{"float32", "bfloat16"};
  Found& found = find(bytes_of(program), dtypes[bf16]);
  const TensorView in[]{view_of(kOp, "input", x)};
  const auto& sizes = output_sizes(found, in);
  SADMM_CHECK(sizes.size() == 1, kOp, ": program got ", sizes.size(), " outputs, wanted one");
  Tensor y = empty(sizes[0], in[0].dtype);
  const TensorView out[]{view_of(kOp, "output", y)};
  const auto segment = found.segment;
  TorchParallel parallel;
  segment->engine.run(in, out, parallel);
  return y;
}

}  // namespace

// shapes is for tracers alone (structadmm/ops.py): they have no bytes to look at. run_segment_1 is for eager calls
// alone.
STABLE_TORCH_LIBRARY_FRAGMENT(structadmm, m) {
  m.def("run_segment(Tensor[] inputs, Tensor program, str dtype, str shapes) -> Tensor[]");
  m.def("run_segment_1(Tensor x, Tensor program, bool bf16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(structadmm, CPU, m) {
  m.impl("run_segment", TORCH_BOX(&run_segment));
  m.impl("run_segment_1", TORCH_BOX(&run_segment_1));
}

}  // namespace structadmm::bindings
