// The steps of the additive recurrence's forward pass with products of pairs of bfloat16, chunk by chunk: with order on
// the tile unit alone.
#pragma once

#include "cpu/recurrence_unit.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Values of bfloat16 as products of pairs meet them. Whether all are finite.
[[maybe_unused]] static bool pair_up_values(const RecurrenceProblem& problem, const Unit& unit, int64_t first, int rows,
                                            const SplitChunk& split) {
  const void* from = row_of(problem.value, problem.dtype, unit.sequence.batch, unit.key_head, first);
  return pair_up_rows(static_cast<const uint16_t*>(advance(from, unit.column, problem.dtype)), problem.value.row_stride,
                      rows, unit.columns, unit.width, split.values);
}

// load_values() for products of pairs: those that are not finite remain in the scratch.
template <int kValueParts>
static bool load_split_values(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  if (kValueParts == 1 && pair_up_values(problem, unit, chunk.first, chunk.rows, scratch.split)) return true;
  load_values(problem, unit, scratch);
  return split_values<kValueParts>(scratch.values, unit.stride, chunk.rows, unit.width, scratch.split);
}

// add_chunk_to_state() in products of pairs, of values that load_split_values() has loaded.
template <int kParts, int kValueParts>
static void split_add_chunk_to_state(const RecurrenceProblem& problem, const Unit& unit, bool finite, Channels channels,
                                     ForwardScratch& scratch) {
  join_state<kParts, kValueParts>(scratch.chunk, scratch.split, channels, unit.width, scratch.state, unit.stride,
                                  next_keys_and_values(problem, unit, scratch.chunk));
  if (!finite) add_chunk_to_state(problem, unit, false, channels, scratch);
}

// read_chunk_rows() on the tile unit.
template <int kParts, int kValueParts>
static bool split_read_chunk_rows(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads;
  const KeyChunk& chunk = scratch.chunk;
  const SplitChunk& split = scratch.split;
  const bool finite = load_split_values<kValueParts>(problem, unit, scratch);
  transpose_to_pairs<kParts>(chunk.gained, chunk.stride, chunk.stride, split.keys, split.panel(),
                             split.key_depth / 2 * kChunkRows, chunk.rows);
  split_state<kParts>(scratch.state, unit.stride, nullptr, problem.key_width, unit.width, split);
  for (int64_t head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
    load_scaled_queries(problem, unit.sequence.batch, head, chunk.first, chunk.rows, chunk.inverse, chunk.stride,
                        scratch.queries);
    split_rows<kParts>(scratch.queries, chunk.stride, chunk.rows, chunk.stride, core::round_up(chunk.rows, kPairRows),
                       split.queries, split.key_depth, kChunkRows * split.key_depth);
    Prefetches prefetches = next_queries_and_outputs(problem, unit, head, chunk.first, chunk.rows);
    prefetches.products = 3;
    read_state<kParts>(split, split.key_depth, chunk.rows, unit.width, scratch.outputs, unit.stride, prefetches);
    read_chunk<kParts, kValueParts>(split, chunk.rows, unit.width, scratch.scores, scratch.outputs, unit.stride,
                                    prefetches);
    if (!finite)
      lower_triangle_product(scratch.scores, scratch.values, unit.stride, scratch.outputs, unit.stride, chunk.rows,
                             unit.width, false);
    write_outputs(problem, unit, head, chunk.first, chunk.rows, scratch);
  }
  return finite;
}

// Outputs from the state of a whole sequence.
template <int kParts>
static void split_read_out(const RecurrenceProblem& problem, const Unit& unit, int64_t head, int64_t first, int rows,
                           ForwardScratch& scratch) {
  SplitChunk split = scratch.split;
  Prefetches prefetches = next_queries_and_outputs(problem, unit, head, first, rows);
  const void* from = row_of(problem.query, problem.dtype, unit.sequence.batch, head, first);
  if (kParts == 1 && split.key_depth == problem.key_width && rows % kPairRows == 0) {
    split.queries = static_cast<uint16_t*>(const_cast<void*>(from));
    read_state<kParts>(split, problem.query.row_stride, rows, unit.width, scratch.outputs, unit.stride, prefetches);
  } else {
    load_rows(problem.query, problem.dtype, unit.sequence.batch, head, first, 0, rows, problem.key_width,
              scratch.queries, scratch.chunk.stride);
    split_rows<kParts>(scratch.queries, scratch.chunk.stride, rows, scratch.chunk.stride,
                       core::round_up(rows, kPairRows), split.queries, split.key_depth, kChunkRows * split.key_depth);
    read_state<kParts>(split, split.key_depth, rows, unit.width, scratch.outputs, unit.stride, prefetches);
  }
  write_outputs(problem, unit, head, first, rows, scratch);
}

// A chunk joins the state of its sequence.
template <int kParts, int kValueParts>
static void split_gather_chunk(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const bool finite = load_split_values<kValueParts>(problem, unit, scratch);
  split_add_chunk_to_state<kParts, kValueParts>(problem, unit, finite, {0, scratch.chunk.stride}, scratch);
}

// A chunk of keys that are all within reach of the shift, of whole vectors and with neither gain nor mask, joins the
// state, its weights in one part, as gather_rows() would have it join. False where it is not that, or where a value is
// not finite: the state and its normaliser are then as they were.
[[maybe_unused]] static bool split_gather_plain_chunk(const RecurrenceProblem& problem, const Unit& unit, int64_t first,
                                                      ForwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  const int rows = static_cast<int>(core::smaller(kChunkRows, unit.sequence.end - first));
  if (rows < kLeastSplitRows || chunk.has_gain || problem.key_mask != nullptr || chunk.stride != problem.key_width)
    return false;
  const int64_t batch = unit.sequence.batch;
  const auto* keys = static_cast<const uint16_t*>(row_of(problem.key, problem.dtype, batch, unit.key_head, first));
  if (!weigh_transposed(keys, problem.key.row_stride, rows, problem.key_width, scratch.normalizer.shift, chunk.factors,
                        scratch.split.weights))
    return false;
  if (!pair_up_values(problem, unit, first, rows, scratch.split)) return false;
  chunk.first = first;
  chunk.rows = rows;
  for (int64_t d = 0; d < chunk.stride; ++d) scratch.normalizer.sum[d] += static_cast<double>(chunk.factors[d]);
  join_state_transposed<1, 1>(chunk, scratch.split, {0, chunk.stride}, unit.width, scratch.state, unit.stride,
                              next_keys_and_values(problem, unit, chunk));
  return true;
}

// The state of a whole sequence, times scale / Delta, as split_read_out() reads it.
template <int kParts>
static void split_whole_state(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  for (int64_t d = 0; d < problem.key_width; ++d) chunk.factors[d] = chunk.inverse[d] * problem.scale;
  split_state<kParts>(scratch.state, unit.stride, chunk.factors, problem.key_width, unit.width, scratch.split);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
