// How many pieces of b make up a; a >= 0, b > 0.
#pragma once

#include <cstdint>

namespace structadmm {

constexpr int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace structadmm
