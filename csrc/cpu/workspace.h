// Memory that a forward hands to its backward. Given back, it waits for the next forward of its size: from the system
// it would come as fresh pages, and first touching those can take longer than to compute again what lies there.
#pragma once

#include <vector>

#include "buffer.h"

namespace fused_margins {

// Python's lock is held wherever one is made or destroyed.
class Workspace {
 public:
  // Given back, it waits as long as all that wait take at most `limit` bytes together; the newest are the last to go.
  Workspace(int64_t bytes, int64_t limit) : block_{nullptr, round_up(bytes < 64 ? 64 : bytes, 64)}, limit_(limit) {
    std::vector<Block>& blocks = waiting();
    for (size_t i = blocks.size(); i-- > 0;)
      if (blocks[i].bytes >= block_.bytes && blocks[i].bytes <= 2 * block_.bytes) {
        block_ = blocks[i];
        blocks.erase(blocks.begin() + std::ptrdiff_t(i));
        return;
      }
    block_.data = std::aligned_alloc(64, size_t(block_.bytes));
    if (!block_.data) throw std::bad_alloc();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    waiting().push_back(block_);
    keep_at_most(limit_);
  }

  void* data() const { return block_.data; }
  int64_t bytes() const { return block_.bytes; }

  static int64_t waiting_bytes() {
    int64_t sum = 0;
    for (const Block& block : waiting()) sum += block.bytes;
    return sum;
  }

  // Return the oldest of those that wait to the system until the others take at most `limit` bytes.
  static void keep_at_most(int64_t limit) {
    std::vector<Block>& blocks = waiting();
    while (waiting_bytes() > limit) {
      std::free(blocks.front().data);
      blocks.erase(blocks.begin());
    }
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  // Oldest first. Never destroyed: tensors may outlive the end of the interpreter.
  static std::vector<Block>& waiting() {
    static auto* blocks = new std::vector<Block>;
    return *blocks;
  }
  Block block_;
  int64_t limit_;
};

}  // namespace fused_margins
