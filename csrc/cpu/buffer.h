// Memory of a kernel: uninitialised, on a cache-line boundary.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "../matrix.h"

namespace fused_margins {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// An odd number of cache lines: rows a power of two apart would meet in few sets of a cache.
inline int64_t odd_lines(int64_t values) {
  return (ceil_div(values, 16) | 1) * 16;
}

// For memory that is about to be written for the first time. What is larger than malloc ever keeps comes from the
// system anew at every call, and its pages one by one as they are touched: 41 MB in pages of 4 KiB took 31 ms in a
// virtual machine and 5 to give back, in pages of 2 MiB 11 and 1. No result depends on it. Where the system has none,
// or gives none or only such, all stays as it is.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t MAPPED = 32 << 20;  // glibc: DEFAULT_MMAP_THRESHOLD_MAX of 64-bit systems
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes < MAPPED || !data) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (begin + uintptr_t(bytes)) / PAGE * PAGE;  // whole pages within: nobody else's memory grows
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: whether it is met does not count
#endif
}
inline void in_huge_pages(void* gradient, const Matrix& of) {
  in_huge_pages(gradient, of.rows * of.width * element_bytes(of.dtype));
}

// Blocks that past calls of this thread gave back, up to BYTES of them. A training step asks for the same ones again;
// from the system they would come as fresh pages, and first touching those takes as long as a small problem.
class Pool {
 public:
  static constexpr int64_t BYTES = 8 << 20, SLOTS = 16;

  static Pool& mine() {
    static thread_local Pool pool;
    return pool;
  }
  ~Pool() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // Memory for `bytes`, a multiple of 64; replaced by what it really holds.
  void* take(int64_t& bytes) {
    for (Block& block : blocks_)
      if (block.bytes >= bytes && block.bytes <= 2 * bytes) {
        void* data = block.data;
        bytes = block.bytes;
        held_ -= bytes;
        block = {};
        return data;
      }
    void* data = std::aligned_alloc(64, size_t(bytes));
    if (!data) throw std::bad_alloc();
    in_huge_pages(data, bytes);
    return data;
  }

  void give(void* data, int64_t bytes) {
    if (bytes <= BYTES / 2)
      for (Block& block : blocks_)
        if (!block.data && held_ + bytes <= BYTES) {
          block = {data, bytes};
          held_ += bytes;
          return;
        }
    std::free(data);
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[SLOTS];
  int64_t held_ = 0;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) {
    if (count <= 0) return;
    bytes_ = round_up(count * int64_t(sizeof(T)), 64);
#ifdef FM_NO_POOL  // under a sanitizer, which looks at every allocation
    data_ = static_cast<T*>(std::aligned_alloc(64, size_t(bytes_)));
    if (!data_) throw std::bad_alloc();
#else
    data_ = static_cast<T*>(Pool::mine().take(bytes_));
#endif
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#ifdef FM_NO_POOL
    std::free(data_);
#else
    if (data_) Pool::mine().give(data_, bytes_);
#endif
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fused_margins
