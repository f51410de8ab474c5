// Per-thread scratch memory, and the shared counters that hand out work.
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

// How threads come by units: from one counter in order, or first from a share of their own, which is the same in every
// call: what a thread has written in one call lies in its cache in the next.
enum class Handout { kInOrder, kSharesFirst };

// The units next to end, handed out one by one.
struct alignas(kCacheLine) Units {
  int64_t next, end;

  // The next one, or -1.
  int64_t take() {
    if (__atomic_load_n(&next, __ATOMIC_RELAXED) >= end) return -1;
    const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    return index < end ? index : -1;
  }
};

// Calls unit(index, state) for every index in [0, count), on all threads; each thread makes its own State first.
// In order, put the long units first. A unit's result must not depend on the thread.
template <class State, class Shared, class Unit>
static void for_each_unit(const Parallel& parallel, int64_t count, const Shared& shared, Unit unit,
                          Handout handout = Handout::kInOrder) {
  constexpr int64_t kMostShares = 32;
  struct Context {
    const Shared& shared;
    Unit unit;
    int64_t share_count;
    int out_of_memory;
    Units shares[kMostShares];

    // One of the thread's own share, then of the shares after it.
    int64_t take(int64_t thread) {
      for (int64_t turn = 0; turn < share_count; ++turn) {
        const int64_t index = shares[(thread + turn) % share_count].take();
        if (index >= 0) return index;
      }
      return -1;
    }
  } context{shared, unit, 1, 0, {}};
  if (handout == Handout::kSharesFirst && parallel.threads > 1)
    context.share_count = core::smaller(parallel.threads, kMostShares);
  for (int64_t share = 0; share < context.share_count; ++share)
    context.shares[share] = {share * count / context.share_count, (share + 1) * count / context.share_count};
  auto body = [](void* pointer, int64_t thread) {
    auto& work = *static_cast<Context*>(pointer);
    int64_t index = work.take(thread);
    if (index < 0) return;
    const FlushDenormals mode;
    try {
      State state(work.shared);
      for (; index >= 0; index = work.take(thread)) work.unit(index, state);
      finish_streams();
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&work.out_of_memory, 1, __ATOMIC_RELAXED);
    }
  };
  if (count <= 1 || parallel.threads <= 1)
    body(&context, 0);
  else
    parallel.run(body, &context, parallel.state);
  if (context.out_of_memory != 0) throw std::bad_alloc();
}

}  // namespace sightline::SIGHTLINE_ISA_NS
