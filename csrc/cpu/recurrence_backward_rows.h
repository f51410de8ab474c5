// What the walks of the recurrence's backward passes read and write next, to be asked for while they multiply.
#pragma once

#include "cpu/prefetch.h"
#include "cpu/recurrence_gradients.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Up to a chunk of rows of a tensor, from `first` on and within begin to end.
[[maybe_unused]] static Prefetch rows_from(const Head& head, const HeadsView& view, int64_t of_head, int64_t first,
                                           int64_t begin, int64_t end, int64_t width) {
  const DType dtype = head.problem.dtype;
  const int64_t start = core::larger(first, begin), stop = core::smaller(first + kChunkRows, end);
  if (start >= stop) return {};
  return {row_of(view, dtype, head.sequence.batch, of_head, start), width * element_size(dtype),
          view.row_stride * element_size(dtype), stop - start};
}

// What the sweep forward reads and writes of a query head's rows, and reads of its next ones.
[[maybe_unused]] static Prefetches rows_of_query_head(const Head& head, int64_t query_head, int64_t first, int64_t end,
                                                      const KeyChunk& chunk) {
  const RecurrenceProblem& problem = head.problem;
  const int64_t after = first + chunk.rows;
  return {{rows_from(head, problem.query, query_head, first, first, after, problem.key_width),
           rows_from(head, head.gradients.grad_output, query_head, after, after, end, problem.value_width)},
          head.grad_queries().prefetch(head.sequence.batch, query_head, first, after - first)};
}

// The keys and values that the sweep forward reads next.
[[maybe_unused]] static Prefetches next_keys_and_values(const Head& head, int64_t end, const KeyChunk& chunk) {
  const int64_t after = chunk.first + chunk.rows;
  return {{rows_from(head, head.problem.key, head.key_head, after, after, end, head.problem.key_width),
           rows_from(head, head.problem.value, head.key_head, after, after, end, head.problem.value_width)},
          {}};
}

// The keys and values that the sweep back reads next, what the sweep forward has kept of the rows at hand, where it is
// not null, and the gradient of the keys that is about to be written.
[[maybe_unused]] static Prefetches earlier_keys_and_values(const Head& head, int64_t begin, const KeyChunk& chunk,
                                                           const float* kept) {
  const int64_t first = chunk.first, before = first - kChunkRows;
  const int64_t row_bytes = chunk.stride * static_cast<int64_t>(sizeof(float));
  return {{rows_from(head, head.problem.key, head.key_head, before, begin, first, head.problem.key_width),
           rows_from(head, head.problem.value, head.key_head, before, begin, first, head.problem.value_width),
           kept == nullptr ? Prefetch() : Prefetch(kept, row_bytes, row_bytes, chunk.rows)},
          head.grad_keys().prefetch(head.sequence.batch, head.key_head, first, chunk.rows)};
}

// The rows of a query head that the sweep back reads next, and the gradient of the values that it is about to write.
[[maybe_unused]] static Prefetches earlier_rows_of_query_head(const Head& head, int64_t query_head, int64_t begin,
                                                              const KeyChunk& chunk) {
  const int64_t first = chunk.first, before = first - kChunkRows;
  return {{rows_from(head, head.problem.query, query_head, before, begin, first, head.problem.key_width),
           rows_from(head, head.gradients.grad_output, query_head, before, begin, first, head.problem.value_width)},
          head.grad_values().prefetch(head.sequence.batch, head.key_head, first, chunk.rows)};
}

// What the walks without order read of a query head's next rows, and write of these.
[[maybe_unused]] static Prefetches next_rows_of_query_head(const Head& head, int64_t query_head, int64_t first,
                                                           int64_t rows) {
  const RecurrenceProblem& problem = head.problem;
  const int64_t after = first + rows, end = head.sequence.end;
  return {{rows_from(head, problem.query, query_head, after, after, end, problem.key_width),
           rows_from(head, head.gradients.grad_output, query_head, after, after, end, problem.value_width)},
          head.grad_queries().prefetch(head.sequence.batch, query_head, first, after - first)};
}

// What the last walk without order reads of the next keys and values, and writes of these.
[[maybe_unused]] static Prefetches next_keys_and_gradients(const Head& head, const KeyChunk& chunk) {
  Prefetches next = next_keys_and_values(head, head.sequence.end, chunk);
  next.writes[0] = head.grad_keys().prefetch(head.sequence.batch, head.key_head, chunk.first, chunk.rows);
  next.writes[1] = head.grad_values().prefetch(head.sequence.batch, head.key_head, chunk.first, chunk.rows);
  return next;
}

}  // namespace sightline::SIGHTLINE_ISA_NS
