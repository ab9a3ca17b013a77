#include "base/large_blocks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

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
  const auto size = static_cast<size_t>(bytes);
  void* data = std::aligned_alloc(page, size);
  if (!data) {
    const std::lock_guard lock(mutex_);
    drop_oldest(0);
    data = std::aligned_alloc(page, size);
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data && page == kHuge) madvise(data, size, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

void LargeBlocks::give(Block block) noexcept {
  if (block.bytes > kKept) return std::free(block.data);
  const std::lock_guard lock(mutex_);
  try {
    idle_.push_back(block);
  } catch (const std::bad_alloc&) {
    return std::free(block.data);
  }
  kept_ += block.bytes;
  drop_oldest(kKept);
}

void LargeBlocks::drop_oldest(int64_t most) {
  for (; kept_ > most; idle_.pop_front()) {
    std::free(idle_.front().data);
    kept_ -= idle_.front().bytes;
  }
}

}  // namespace structadmm
