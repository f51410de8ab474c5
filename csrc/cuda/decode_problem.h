// What the decoding kernels are given: an AttentionProblem whose pointers are the device's, memory to work in, and how
// the keys are split.
//
// The query rows of all heads that share a key head are numbered rho = g * M + i (g: head within the group) and cut
// into blocks of 16. A "packed row" is (batch, key head, rho) as one index.
#pragma once

#include <cstdint>

#include "core/compensated_sum.h"
#include "core/macros.h"
#include "core/problem.h"
#include "core/visibility.h"

namespace sightline::cuda {

constexpr int kRowBlock = 16;  // rows of a block: the height of the matrix instruction
constexpr int kKeyTile = 16;   // keys of a warp's step
constexpr int kWarps = 4;
constexpr int kThreads = 128;
constexpr int kWidthStep = 64;  // columns of a value tile
constexpr int kWidestHead = 256;

// Blocks that a multiprocessor holds at once. Registers limit them: the sums alone take 32, 64 or 128 of them.
constexpr int blocks_per_processor(bool is_float32, int64_t kernel_width) {
  return is_float32 || kernel_width > 128 ? 2 : kernel_width > 64 ? 3 : 4;
}

// What the keys of one split gave to one row. `weights` is relative to the reference that `largest` implies
// (relative_weight.h); `divisor` is the sum of the weights as they were rounded for the product with V.
struct alignas(16) RowPartial {
  float largest;
  float weights, weights_rest;
  float divisor;
};

struct DecodeProblem {
  AttentionProblem attention;  // its key_lengths, visible_prefix and scales may be null
  const void* lengths = nullptr;
  bool lengths_are_64_bit = false;
  float scale = 1.0f;       // where attention.scales is null
  bool vectorized = false;  // rows of K and V are whole 16-byte words

  int64_t splits = 1;
  RowPartial* row_partials = nullptr;     // (packed rows, splits)
  RowPartial* weight_partials = nullptr;  // (packed rows, splits), of the second sweep of re-weighting
  float* value_partials = nullptr;        // (packed rows, splits, Dv)
  float* scores = nullptr;                // (packed rows, score_stride), re-weighting only
  int32_t* visible_keys = nullptr;        // (B, M), with key_mask only
};

SIGHTLINE_INLINE int64_t group_rows(const AttentionProblem& problem) {
  return problem.heads / problem.key_heads * problem.queries;
}
SIGHTLINE_INLINE int64_t row_blocks(const AttentionProblem& problem) {
  return (group_rows(problem) + kRowBlock - 1) / kRowBlock;
}
// Rows that are not whole 16-byte words are rare and slow anyway: the widest kernel serves them all.
SIGHTLINE_INLINE int64_t kernel_width(const DecodeProblem& problem) {
  const int64_t width = core::larger(problem.attention.head_width, problem.attention.value_width);
  return !problem.vectorized || width > 128 ? kWidestHead : width > 64 ? 128 : 64;
}
SIGHTLINE_INLINE int64_t packed_rows(const AttentionProblem& problem) {
  return problem.batch * problem.heads * problem.queries;
}
SIGHTLINE_INLINE int64_t score_stride(const AttentionProblem& problem) {
  return core::round_up(problem.keys, kKeyTile);
}
SIGHTLINE_INLINE bool counts_keys(const AttentionProblem& problem) {
  return problem.length_scale || problem.reweight.power > 0.0f;
}

// The valid keys of a batch entry, whatever the caller wrote into key_lengths.
SIGHTLINE_INLINE int64_t valid_keys(const DecodeProblem& problem, int64_t batch) {
  if (problem.lengths == nullptr) return problem.attention.keys;
  const int64_t length = problem.lengths_are_64_bit ? static_cast<const int64_t*>(problem.lengths)[batch]
                                                    : static_cast<const int32_t*>(problem.lengths)[batch];
  return core::smaller(core::larger(length, 0), problem.attention.keys);
}

// The keys of a row as [first, last] within the tensor; {0, -1} where it sees none.
SIGHTLINE_INLINE core::KeyInterval row_interval(const DecodeProblem& problem, int64_t batch, int64_t query) {
  core::KeyInterval interval = core::visible_interval_within(problem.attention, valid_keys(problem, batch), query);
  interval.first = core::larger(interval.first, 0);
  if (interval.last < interval.first) interval.first = 0, interval.last = -1;
  return interval;
}

// Keys [begin, end); begin is the first key of a tile. An index of a key fits 32 bits, an address does not.
struct KeyRange {
  int32_t begin = 0, end = 0;
};

// Part `split` of the tiles that hold the keys [first, last]. It depends on what the rows see and not on the size of
// the cache, so that a long cache with few valid keys still keeps every block busy.
SIGHTLINE_INLINE KeyRange keys_of_split(int64_t first, int64_t last, int64_t split, int64_t splits) {
  if (last < first) return {};
  const int64_t first_tile = first / kKeyTile;
  const int64_t tiles = last / kKeyTile + 1 - first_tile;
  const int64_t begin = first_tile + tiles * split / splits;
  const int64_t end = first_tile + tiles * (split + 1) / splits;
  return {static_cast<int32_t>(begin * kKeyTile), static_cast<int32_t>(core::smaller(end * kKeyTile, last + 1))};
}

}  // namespace sightline::cuda
