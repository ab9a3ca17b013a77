#include "kernels/topk_keep/topk_keep.h"

#include <bit>
#include <memory>

namespace structadmm {
namespace {

constexpr int kBits = 11;  // 2048 counters fit the first-level cache, and three rounds cover 32 bits
constexpr int kBins = 1 << kBits;

// Unsigned integers in the order of the floats. Adding +0 makes -0 into +0.
inline uint32_t key_of(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The bin in which the k-th largest key lies, and k less the keys in the bins above it.
int find_bin(const uint32_t* counts, int64_t& k) {
  int bin = kBins - 1;
  for (; counts[bin] < k; --bin) k -= counts[bin];
  return bin;
}

}  // namespace

int64_t topk_keep(const float* scores, int64_t n, int64_t k, uint8_t* keep) {
  const bool count = 0 < k && k < n;
  uint32_t counts[kBins] = {};
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad |= (std::bit_cast<uint32_t>(scores[i]) & 0x7f800000u) == 0x7f800000u;
    ++counts[key_of(scores[i]) >> (32 - kBits)];
  }
  if (bad) {
    int64_t i = 0;
    while ((std::bit_cast<uint32_t>(scores[i]) & 0x7f800000u) != 0x7f800000u) ++i;
    return i;
  }
  if (!count) {
    for (int64_t i = 0; i < n; ++i) keep[i] = k > 0;
    return -1;
  }

  // After each round, the keys that share the threshold's leading bits.
  int64_t left = k;
  uint32_t threshold = static_cast<uint32_t>(find_bin(counts, left));
  int64_t m = counts[threshold];
  const std::unique_ptr<uint32_t[]> keys(new uint32_t[static_cast<size_t>(m)]);
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(scores[i]);
    if (key >> (32 - kBits) == threshold) keys[at++] = key;
  }
  for (int shift : {32 - 2 * kBits, 0}) {
    const int bits = shift ? kBits : 32 - 2 * kBits;
    for (uint32_t& c : counts) c = 0;
    for (int64_t i = 0; i < m; ++i) ++counts[keys[i] >> shift & ((1u << bits) - 1)];
    threshold = threshold << bits | static_cast<uint32_t>(find_bin(counts, left));
    int64_t kept = 0;
    for (int64_t i = 0; i < m; ++i) {
      if (keys[i] >> shift == threshold) keys[kept++] = keys[i];
    }
    m = kept;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(scores[i]);
    const bool tied = key == threshold;
    keep[i] = key > threshold || (tied && left > 0);
    left -= tied && left > 0;
  }
  return -1;
}

}  // namespace structadmm
