// What is read from beyond the caches once a step is done: a step that is bound by arithmetic fetches it meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>

namespace structadmm {

struct Ahead {
  const std::byte *at = nullptr, *end = nullptr;

  // The next of it, as many bytes, which may end behind its end; null where nothing is left.
  const void* take(int64_t bytes) {
    if (at >= end) return nullptr;
    const std::byte* const some = at;
    at += bytes;
    return some;
  }
};

// Of this thread. The engine sets it before each step.
inline thread_local Ahead fetch_ahead;

}  // namespace structadmm
