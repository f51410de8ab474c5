// Which keys a query row may attend to: the interval that lengths, causality, windows and documents leave
// (MATH.md, "Positions and visibility"). Masks thin it out further.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/problem.h"

namespace sightline::core {

struct KeyInterval {
  int64_t first = 0;     // first visible key
  int64_t last = -1;     // last visible key; last < first: none
  int64_t position = 0;  // pos_i, counted from the start of the key tensor
};

SIGHTLINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SIGHTLINE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SIGHTLINE_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The document of a row: the last d with cu_seqlens[d] <= row, or -1 past the end.
SIGHTLINE_INLINE int64_t find_document(const int32_t* cu_seqlens, int64_t documents, int64_t row) {
  if (documents == 0 || row < cu_seqlens[0] || row >= cu_seqlens[documents]) return -1;
  int64_t low = 0, high = documents;  // cu_seqlens[low] <= row < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return low;
}

// `length`: the valid keys of the row's batch entry, in [0, N]; packed documents have lengths of their own.
SIGHTLINE_INLINE KeyInterval visible_interval_within(const AttentionProblem& problem, int64_t length, int64_t row) {
  KeyInterval interval;
  if (problem.cu_seqlens_q != nullptr) {
    const int64_t document = find_document(problem.cu_seqlens_q, problem.documents, row);
    if (document < 0) return interval;
    // Offsets past the tensor are cut off: the C++ side must stay in bounds whatever the caller passed.
    const int64_t key_begin = smaller(larger(problem.cu_seqlens_k[document], 0), problem.keys);
    const int64_t key_end = smaller(larger(problem.cu_seqlens_k[document + 1], key_begin), problem.keys);
    const int64_t queries = problem.cu_seqlens_q[document + 1] - problem.cu_seqlens_q[document];
    interval.position = key_begin + (row - problem.cu_seqlens_q[document]) + (key_end - key_begin) - queries;
    interval.first = key_begin;
    interval.last = key_end - 1;
  } else {
    interval.position = row + length - problem.queries;
    interval.last = length - 1;
  }
  if (problem.causal) interval.last = smaller(interval.last, interval.position);
  if (problem.window_right >= 0) interval.last = smaller(interval.last, interval.position + problem.window_right);
  if (problem.window_left >= 0) interval.first = larger(interval.first, interval.position - problem.window_left);
  return interval;
}

SIGHTLINE_INLINE KeyInterval visible_interval(const AttentionProblem& problem, int64_t batch, int64_t row) {
  const int64_t length = problem.key_lengths != nullptr ? problem.key_lengths[batch] : problem.keys;
  return visible_interval_within(problem, length, row);
}

}  // namespace sightline::core
