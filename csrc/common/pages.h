// Large pages for large outputs.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_margins {

// Asks for pages of 2 MiB in memory that is about to be written for the first time. A fault for every 4 KiB of a fresh
// gradient of a hundred thousand classes takes a good part of the products' time. Where the system has no such pages,
// or gives them to everybody, nothing changes.
inline void use_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (uintptr_t(data) + PAGE - 1) / PAGE * PAGE, end = (uintptr_t(data) + bytes) / PAGE * PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fused_margins
