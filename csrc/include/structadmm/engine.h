// structadmm in C++: runs a network that structadmm.save or `structadmm compact` wrote, without Python and without
// torch.
//
//   structadmm::Engine engine("net.safetensors");
//   std::vector<float> scores = engine.run(image.data(), {1, 3, 32, 32});
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define STRUCTADMM_API __attribute__((visibility("default")))
#else
#define STRUCTADMM_API
#endif

namespace structadmm {

// "what got ..., wanted ...". Everything here reports a wrong file or argument by it.
#ifndef STRUCTADMM_ERROR
#define STRUCTADMM_ERROR
class STRUCTADMM_API Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};
#endif

STRUCTADMM_API const char* version();

// Instruction sets that were compiled in and that this CPU has, the best last.
STRUCTADMM_API std::vector<std::string> supported_isas();

enum class DataType { kFloat32, kBfloat16, kFloat16 };

// A tensor of the caller's: sizes with the batch first; strides in elements, empty where it is contiguous.
struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  DataType dtype = DataType::kFloat32;
};

struct Options {
  DataType dtype = DataType::kFloat32;  // what it computes in: kFloat32, or kBfloat16 with float32 sums
  std::string isa;                      // an instruction set; empty: the best, or the one that STRUCTADMM_ISA names
  // Threads of this engine's own pool; 0: the pool of the process, STRUCTADMM_NUM_THREADS or as many as there are CPUs.
  int threads = 0;
};

// A network, its weights packed at the first run of a shape. Results depend neither on the number of threads nor on
// what else is in the batch. run may be called from several threads at once.
class STRUCTADMM_API Engine {
 public:
  explicit Engine(const std::string& path, const Options& options = {});
  // The bytes of such a file; not needed afterwards.
  Engine(const void* data, size_t size, const Options& options = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  size_t inputs() const;
  size_t outputs() const;

  // Sizes of each input as the file has them, without the batch; empty where the file does not say.
  std::vector<std::vector<int64_t>> input_sizes() const;

  // What structadmm.save was given as metadata, a JSON object.
  const std::string& metadata() const;

  // Sizes of the outputs for inputs of these sizes, batch first.
  std::vector<std::vector<int64_t>> output_sizes(const std::vector<std::vector<int64_t>>& input_sizes) const;

  // Writes the outputs, which have the sizes that output_sizes tells. They may not overlap the inputs.
  void run(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const;

  // The output of a network with one input and one output, both contiguous.
  std::vector<float> run(const float* input, const std::vector<int64_t>& sizes) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace structadmm
