// Memory that each thread keeps for its next call: at least so many floats, of any content but never uninitialised. It
// never shrinks. The next call for the same use by the same thread may give the same memory, so one caller holds it at
// a time; while it waits for other threads, its own must not run another. On huge pages: each tap of a convolution
// reads another channel, hence another small page (measured: 2 to 10 % of a layer). Throws std::bad_alloc.
#pragma once

#include <cstdint>

namespace structadmm {

enum class Scratch { kCopy, kPanel };  // a copy of x, padded or in phases, and what a kernel collects of it

float* scratch(int64_t floats, Scratch use);

}  // namespace structadmm
