// Asking for memory ahead of its use.
#pragma once

#include "core/visibility.h"
#include "cpu/tile_shapes.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows of memory that are asked for line by line while something else is computed, so that their bytes need not be
// waited for.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* start, int64_t row_bytes, int64_t bytes_between, int64_t rows)
      : next_(static_cast<const char*>(start)), row_bytes_(row_bytes), bytes_between_(bytes_between), rows_(rows) {}

  // The pace with which so many calls of ask() ask for what is left.
  void spread(int64_t times) {
    const int64_t lines = core::larger(rows_, 0) * ((row_bytes_ + kLineBytes - 1) / kLineBytes);
    pace_ = times > 0 ? (lines * kWhole + times - 1) / times : 0;
  }

  template <bool kWrite>
  __attribute__((always_inline)) inline void ask() {
    if (rows_ <= 0) return;
    for (due_ += pace_; due_ >= kWhole && rows_ > 0; due_ -= kWhole) {
      __builtin_prefetch(next_ + offset_, kWrite, 2);
      offset_ += kLineBytes;
      if (offset_ < row_bytes_) continue;
      offset_ = 0;
      --rows_;
      next_ += bytes_between_;
    }
  }

 private:
  static constexpr int64_t kWhole = 1 << 16;  // one line, in the unit of the two below

  const char* next_ = nullptr;
  int64_t row_bytes_ = 0, bytes_between_ = 0, rows_ = 0, offset_ = 0;
  int64_t pace_ = 0, due_ = 0;
};

// What is read and what is written next.
struct Prefetches {
  Prefetch reads[3];
  Prefetch writes[2];
  int products = 1;  // that share them, of those still to come

  // Before a product that calls ask() so many times.
  void spread(int64_t times) {
    times *= products;
    if (products > 1) --products;
    for (Prefetch& rows : reads) rows.spread(times);
    for (Prefetch& rows : writes) rows.spread(times);
  }

  __attribute__((always_inline)) inline void ask() {
    reads[0].ask<false>();
    reads[1].ask<false>();
    reads[2].ask<false>();
    writes[0].ask<true>();
    writes[1].ask<true>();
  }
};

// What a product does every few steps of its depth: asking for memory, or nothing. A core has room for few lines that
// are on their way, and the product's own loads from the second-level cache need it too: with the rows of a few blocks
// asked for at once products took up to a tenth longer (interleaved).
struct AskFor {
  Prefetches& prefetches;
  void spread(int64_t times) const { prefetches.spread(times); }
  __attribute__((always_inline)) inline void operator()() const { prefetches.ask(); }
};
struct Nothing {
  void spread(int64_t) const {}
  void operator()() const {}
};

}  // namespace sightline::SIGHTLINE_ISA_NS
