// Asking for memory ahead of its use.
#pragma once

#include "cpu/tile_shapes.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows of memory that are asked for while something else is computed, so that their bytes need not be waited for.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* start, int64_t row_bytes, int64_t bytes_between, int64_t rows)
      : next_(static_cast<const char*>(start)), row_bytes_(row_bytes), bytes_between_(bytes_between), rows_(rows) {}

  template <bool kWrite>
  __attribute__((always_inline)) inline void ask(int64_t rows) {
    for (; rows > 0 && rows_ > 0; --rows, --rows_, next_ += bytes_between_)
      for (int64_t offset = 0; offset < row_bytes_; offset += 64) __builtin_prefetch(next_ + offset, kWrite, 2);
  }

 private:
  const char* next_ = nullptr;
  int64_t row_bytes_ = 0, bytes_between_ = 0, rows_ = 0;
};

// What is read and what is written next.
struct Prefetches {
  Prefetch reads[3];
  Prefetch writes[2];

  __attribute__((always_inline)) inline void ask(int64_t rows) {
    reads[0].ask<false>(rows);
    reads[1].ask<false>(rows);
    reads[2].ask<false>(rows);
    writes[0].ask<true>(rows);
    writes[1].ask<true>(rows);
  }
};

// For product() to do between its blocks.
struct AskFor {
  Prefetches& rows;
  void operator()() const { rows.ask(kRowsAskedForPerBlock); }
};

}  // namespace sightline::SIGHTLINE_ISA_NS
