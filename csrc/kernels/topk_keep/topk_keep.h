// Exactly k of n scores kept: the largest, ties to the lower index (+0 and -0 are equal).
//
//   keep[i] = 1 if fewer than k scores s[j] come before s[i], where s[j] comes before s[i] if s[j] > s[i], or they are
//   equal and j < i;  0 otherwise
//
// A radix selection over the bits of the floats, O(n). keep is written only if all scores are finite.
#pragma once

#include <cstdint>

namespace structadmm {

// The index of the first score that is NaN or infinite, or -1: done.
int64_t topk_keep(const float* scores, int64_t n, int64_t k, uint8_t* keep);

}  // namespace structadmm
