#include "base/large_blocks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "base/div_up.h"

namespace structadmm {
namespace {

constexpr int64_t kKept = 256 << 20;               // bytes of idle blocks
constexpr int64_t kHuge = 2 << 20, kSmall = 4096;  // bytes of a page

}  // namespace

LargeBlocks& LargeBlocks::instance() {
  static auto* const blocks = new LargeBlocks;  // never destroyed: arrays may outlive static objects
  return *blocks;
}

LargeBlocks::Block LargeBlocks::take(int64_t bytes) {
  const int64_t page = bytes < kHuge ? kSmall : kHuge;
  bytes = div_up(bytes, page) * page;
  {
    const std::lock_guard lock(mutex_);
    // The last one given back, of which caches may still hold a part.
    for (auto it = idle_.end(); it != idle_.begin();) {
      --it;
      if (it->bytes < bytes || it->bytes > bytes + bytes / 4) continue;
      const Block found = *it;
      idle_.erase(it);
      kept_ -= found.bytes;
      return found;
    }
  }
  void* const data = std::aligned_alloc(page, static_cast<size_t>(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data && page == kHuge) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

// The oldest make room.
void LargeBlocks::give(Block block) {
  const std::lock_guard lock(mutex_);
  idle_.push_back(block);
  for (kept_ += block.bytes; kept_ > kKept; idle_.pop_front()) {
    std::free(idle_.front().data);
    kept_ -= idle_.front().bytes;
  }
}

}  // namespace structadmm
