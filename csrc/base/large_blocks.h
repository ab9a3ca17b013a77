// Memory of large outputs, kept for the next ones, and from 2 MB on huge pages. On small pages, whose addresses a
// processor has to look up where filters lie far apart, a 1x1 convolution to 13 MB took 1.4 to 1.8 times as long. And
// the C library gives blocks back to the system (those beyond a threshold that moves from 128 KB to 32 MB, and what
// lies at the end of its heap), which zeroes new ones page by page: eight times as long for one to 51 MB. Any thread
// may call. Up to 256 MB of idle blocks are held.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>

namespace structadmm {

class LargeBlocks {
 public:
  static constexpr int64_t kLarge = 128 << 10;  // bytes: what is worth a block
  struct Block {
    void* data;
    int64_t bytes;
  };

  static LargeBlocks& instance();

  // A block of at least so many bytes, in whole pages, of any content. data = null: there is no memory.
  Block take(int64_t bytes);
  // One that take() gave, for its next call.
  void give(Block block) noexcept;

 private:
  void drop_oldest(int64_t most);  // until so many bytes are idle

  std::mutex mutex_;
  std::list<Block> idle_;
  int64_t kept_ = 0;
};

}  // namespace structadmm
