#include "base/scratch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace structadmm {

float* scratch(int64_t floats, Scratch use) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffers[2];
  thread_local int64_t sizes[2] = {};
  auto& buffer = buffers[static_cast<int>(use)];
  int64_t& size = sizes[static_cast<int>(use)];
  if (floats > size) {
    buffer.reset();
    size = 0;
    constexpr size_t kPage = 2 << 20;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + kPage - 1) / kPage * kPage;
    buffer.reset(static_cast<float*>(std::aligned_alloc(kPage, bytes)));
    if (!buffer) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(buffer.get(), bytes, MADV_HUGEPAGE);
#endif
    size = static_cast<int64_t>(bytes / sizeof(float));
    std::fill_n(buffer.get(), size, 0.0f);
  }
  return buffer.get();
}

}  // namespace structadmm
