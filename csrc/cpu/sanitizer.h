// What AddressSanitizer cannot find by itself, in builds with it (cmake/Sanitizers.cmake); nothing in all others.
//
// A thread's scratch memory is one allocation cut into arrays, so a step from one array into the next is a legal access
// unless a poisoned gap lies between them. Tile instructions are assembler to the compiler, which checks none of it.
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIGHTLINE_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIGHTLINE_ADDRESS_SANITIZER 1
#endif
#endif

#if defined(SIGHTLINE_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(SIGHTLINE_ADDRESS_SANITIZER)

constexpr int64_t kGapBytes = 256;

SIGHTLINE_INLINE void forbid(const char* memory, int64_t bytes) {
  __asan_poison_memory_region(memory, static_cast<size_t>(bytes));
}

// Reads the rows of a tile in a way that is checked.
SIGHTLINE_INLINE void check_tile(const void* rows, int64_t row_stride, int64_t row_count, int64_t row_bytes) {
  for (int64_t row = 0; row < row_count; ++row) {
    const char* start = static_cast<const char*>(rows) + row * row_stride;
    const void* bad = __asan_region_is_poisoned(const_cast<char*>(start), static_cast<size_t>(row_bytes));
    if (bad != nullptr) *static_cast<const volatile char*>(bad);
  }
}

#else

constexpr int64_t kGapBytes = 0;

SIGHTLINE_INLINE void forbid(const char*, int64_t) {}
SIGHTLINE_INLINE void check_tile(const void*, int64_t, int64_t, int64_t) {}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
