// Large memory that is about to be written for the first time: every page of it is a trap into the kernel, which for
// long contexts takes as long as much of the work, and every page needs its place in the TLB. Where the administrator
// leaves the choice to programs ("madvise", the usual setting on Linux), this asks for pages of 2 MiB instead of 4 KiB,
// as NumPy does for its arrays. Pages that the memory does not fill are left alone, so none of it becomes larger.
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sightline::core {

constexpr int64_t kHugePage = 2 * 1024 * 1024;
// Below this an allocator hands out the same memory again and again, whose pages are there already.
constexpr int64_t kLeastBytesOfHugePages = 2 * kHugePage;

// Advice only: what the system makes of it changes no result.
SIGHTLINE_INLINE void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kLeastBytesOfHugePages) return;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t size = kHugePage, first = (start + size - 1) / size * size;
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) / size * size;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace sightline::core
