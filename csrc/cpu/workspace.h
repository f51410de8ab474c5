// Per-thread scratch memory, and the shared counter that hands out work.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/huge_pages.h"
#include "core/visibility.h"
#include "cpu/sanitizer.h"
#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

constexpr int64_t kCacheLine = 64;

// Cuts one aligned allocation into arrays; an array of nothing is null. Used twice: with no memory to measure, then
// with memory to hand out.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  __attribute__((always_inline)) inline T* take(int64_t count) {
    char* start = memory_ == nullptr || count == 0 ? nullptr : memory_ + used_;
    const int64_t end = used_ + count * static_cast<int64_t>(sizeof(T));
    used_ = core::round_up(end + kGapBytes, kCacheLine);
    if (memory_ != nullptr) forbid(memory_ + end, used_ - end);
    return reinterpret_cast<T*>(start);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

class Allocation {
 public:
  explicit Allocation(int64_t bytes)
      : memory_(static_cast<char*>(
            std::aligned_alloc(kCacheLine, static_cast<size_t>(core::round_up(bytes + 1, kCacheLine))))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    core::ask_for_huge_pages(memory_, bytes);
    forbid(memory_ + bytes, core::round_up(bytes + 1, kCacheLine) - bytes);
  }
  ~Allocation() { std::free(memory_); }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  char* get() const { return memory_; }

 private:
  char* memory_;
};

// The State of units that need no memory.
struct NoScratch {
  template <class Shared>
  explicit NoScratch(const Shared&) {}
};

// Calls unit(index, state) for every index in [0, count), on all threads; each thread makes its own State first.
// Units are handed out in order, so put the long ones first. A unit's result must not depend on the thread.
template <class State, class Shared, class Unit>
static void for_each_unit(const Parallel& parallel, int64_t count, const Shared& shared, Unit unit) {
  struct Context {
    const Shared& shared;
    Unit unit;
    int64_t count;
    int64_t next;
    int out_of_memory;
  } context{shared, unit, count, 0, 0};
  auto body = [](void* pointer) {
    auto& work = *static_cast<Context*>(pointer);
    int64_t index = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
    if (index >= work.count) return;
    const FlushDenormals mode;
    try {
      State state(work.shared);
      for (; index < work.count; index = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED)) work.unit(index, state);
      finish_streams();
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&work.out_of_memory, 1, __ATOMIC_RELAXED);
    }
  };
  if (count <= 1 || parallel.threads <= 1)
    body(&context);
  else
    parallel.run(body, &context, parallel.state);
  if (context.out_of_memory != 0) throw std::bad_alloc();
}

}  // namespace sightline::SIGHTLINE_ISA_NS
