// Asking for memory ahead of its use.
#pragma once

#include "core/visibility.h"
#include "cpu/tile_shapes.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows of memory that are asked for while something else is computed, so that their bytes need not be waited for.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* start, int64_t row_bytes, int64_t bytes_between, int64_t rows)
      : next_(static_cast<const char*>(start)), row_bytes_(row_bytes), bytes_between_(bytes_between), rows_(rows) {}

  // At least the lines that are left.
  int64_t lines() const { return rows_ * ((row_bytes_ + kLineBytes - 1) / kLineBytes); }

  template <bool kWrite>
  __attribute__((always_inline)) inline void ask(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(next_ + offset_, kWrite, 2);
      offset_ += kLineBytes;
      if (offset_ < row_bytes_) continue;
      offset_ = 0;
      --rows_;
      next_ += bytes_between_;
    }
  }

 private:
  const char* next_ = nullptr;
  int64_t row_bytes_ = 0, bytes_between_ = 0, rows_ = 0, offset_ = 0;
};

// What is read and what is written next.
struct Prefetches {
  Prefetch reads[3];
  Prefetch writes[2];
  int64_t lines_at_once = 0;  // of each

  // Lets as many calls of ask() as `times` ask for all of it.
  void spread(int64_t times) {
    int64_t most = 0;
    for (const Prefetch& rows : reads) most = core::larger(most, rows.lines());
    for (const Prefetch& rows : writes) most = core::larger(most, rows.lines());
    lines_at_once = times > 0 ? (most + times - 1) / times : 0;
  }

  __attribute__((always_inline)) inline void ask() {
    reads[0].ask<false>(lines_at_once);
    reads[1].ask<false>(lines_at_once);
    reads[2].ask<false>(lines_at_once);
    writes[0].ask<true>(lines_at_once);
    writes[1].ask<true>(lines_at_once);
  }
};

// What a product does every few steps of its depth, so many times in all: asking for memory, or nothing. Spread over
// the product, few lines are under way at any time. A core waits for 16 at most (Golden Cove): asked for in a burst,
// they hold up the product's own loads from the second-level cache for as long as memory takes to answer.
struct AskFor {
  Prefetches& rows;
  void spread(int64_t times) const { rows.spread(times); }
  void operator()() const { rows.ask(); }
};
struct Nothing {
  void spread(int64_t) const {}
  void operator()() const {}
};

}  // namespace sightline::SIGHTLINE_ISA_NS
