// How rows of fp32 become rows of a result: through the caches, or past them.
//
// A store to a line that is in no cache reads it first, only for all of it to be written. Stores past the caches spare
// that, and leave the caches to what is read again. They are for results that would not stay there anyway: of a smaller
// one whoever reads it next finds nothing.
#pragma once

#include "cpu/prefetch.h"
#include "cpu/row_math.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows of some heads of a result, or some of their columns.
struct ResultRows {
  HeadsView view;
  DType dtype;
  int64_t columns;
  bool past_caches;

  // `width` columns from `column` on, of a result of `count` numbers.
  ResultRows(const HeadsView& tensor, DType type, int64_t column, int64_t width, int64_t count)
      : view(tensor), dtype(type), columns(width) {
    const int64_t size = element_size(type);
    view.data = advance(view.data, column, type);
    const auto whole_lines = [size](int64_t elements) { return elements * size % kLineBytes == 0; };
    past_caches = kHasStreams && count * size >= kStreamedBytes && whole_lines(width) &&
                  reinterpret_cast<uintptr_t>(view.data) % kLineBytes == 0 && whole_lines(view.batch_stride) &&
                  whole_lines(view.head_stride) && whole_lines(view.row_stride);
  }

  // Rounds `rows` rows, `stride` apart, to the dtype.
  void write(const float* from, int64_t stride, int64_t batch, int64_t head, int64_t first, int rows) const {
    for (int row = 0; row < rows; ++row, from += stride) {
      void* to = writable_row_of(view, dtype, batch, head, first + row);
      if (past_caches)
        narrow<true>(from, to, dtype, columns);
      else
        narrow(from, to, dtype, columns);
    }
  }

  // Asking for the memory of rows that are about to be written.
  Prefetch prefetch(int64_t batch, int64_t head, int64_t first, int64_t rows) const {
    if (past_caches) return {};
    const int64_t size = element_size(dtype);
    return {row_of(view, dtype, batch, head, first), columns * size, view.row_stride * size, rows};
  }
};

}  // namespace sightline::SIGHTLINE_ISA_NS
