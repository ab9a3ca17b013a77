// torch's current CUDA stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "base/check.h"

namespace structadmm::bindings {

// The C shim lives in libtorch_cuda, which a CPU-only torch lacks and which Python loads with local visibility, so that
// neither linking nor a weak symbol finds it: ask the loader for the library that is already there. A stream of 0 is
// torch's default stream and valid; a missing function is an error.
inline void* current_cuda_stream(const char* op, int device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  SADMM_CHECK(function, op, ": got a torch without aoti_torch_get_current_cuda_stream, wanted one built with CUDA");
  void* stream = nullptr;
  SADMM_CHECK(function(device_index, &stream) == 0, op, ": torch could not tell the current stream of CUDA device ",
              device_index);
  return stream;
}

}  // namespace structadmm::bindings
