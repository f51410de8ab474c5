// What the causal backward pass of the additive recurrence does with one chunk (MATH.md section 4): dq on the way
// forward, dv, G v and G on the way back.
#pragma once

#include "cpu/recurrence_backward_rows.h"
#include "cpu/recurrence_split_backward.h"

namespace sightline::SIGHTLINE_ISA_NS {

// C += A^T B where only the entries of A (rows, rows) on and below the diagonal are set, and the others become 0 here.
[[maybe_unused]] static void upper_triangle_product(float* a, const float* b, int64_t b_stride, float* c,
                                                    int64_t c_stride, int rows, int64_t columns, bool finite) {
  for (int begin = 0; begin < rows; begin += kTriangleRows) {
    const int end = begin + kTriangleRows < rows ? begin + kTriangleRows : rows;
    for (int row = begin; row < end; ++row) zero(a + row * kChunkRows + row + 1, end - row - 1);
    accumulate_product(finite, {a + begin * kChunkRows + begin, 1, kChunkRows}, b + begin * b_stride, b_stride,
                       c + begin * c_stride, c_stride, end - begin, columns, rows - begin);
  }
}

// Whether the chunk's products may go through the tile unit.
[[maybe_unused]] static bool suits_tile_unit(const BackwardScratch& scratch, bool finite_values) {
  const KeyChunk& chunk = scratch.chunk;
  return chunk.rows >= kLeastSplitRows && finite_values && is_finite(chunk.gained, chunk.rows * chunk.stride);
}

// dq = scale / Delta_t (S do_t), written, and q dq / Delta added to what the segment keeps of its rows.
[[maybe_unused]] static void finish_query_gradients(const Head& head, int64_t query_head, int64_t first,
                                                    float* query_responses, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const bool first_of_group = query_head % head.group() == 0;
  const bool past_caches = head.group() == 1 && head.kept_bytes() >= kStreamedBytes;
  const Vec scale = Vec::broadcast(problem.scale), nothing = Vec::broadcast(0.0f);
  load_rows(problem.query, problem.dtype, head.sequence.batch, query_head, first, 0, chunk.rows, problem.key_width,
            scratch.queries, chunk.stride);
  for (int row = 0; row < chunk.rows; ++row) {
    float* gradient = scratch.received + row * chunk.stride;
    float* response = query_responses + row * chunk.stride;
    for (int64_t d = 0; d < chunk.stride; d += Vec::kWidth) {
      const Vec inverse = Vec::load(chunk.inverse + row * chunk.stride + d);
      const Mask dead = equal(inverse, nothing);
      const Vec normalized = select(dead, nothing, Vec::load(gradient + d) * inverse);
      const Vec query = select(dead, nothing, Vec::load(scratch.queries + row * chunk.stride + d) * inverse * scale);
      store(gradient + d, normalized * scale);
      // The factors in the order in which the sweep back multiplies them: what cancels there cancels to 0.
      const Vec product = query * normalized;
      if (past_caches)
        stream(response + d, product);
      else
        store(response + d, first_of_group ? product : product + Vec::load(response + d));
    }
  }
  head.grad_queries().write(scratch.received, chunk.stride, head.sequence.batch, query_head, first, chunk.rows);
}

// dq of a chunk from the state before it.
[[maybe_unused]] static void read_chunk_state(const Head& head, int64_t first, int64_t end, float* query_responses,
                                              BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const bool finite_keys = is_finite(chunk.gained, chunk.rows * chunk.stride);
  transpose(scratch.values, scratch.value_stride, scratch.transposed_values, kChunkRows, padded(chunk.rows),
            scratch.value_stride);
  head.for_each_query_head([&](int64_t query_head) {
    load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    Prefetches own = rows_of_query_head(head, query_head, first, end, chunk);
    product<false>({scratch.grad_outputs, scratch.value_stride, 1}, scratch.transposed_state, chunk.stride,
                   scratch.received, chunk.stride, chunk.rows, chunk.stride, problem.value_width, AskFor{own});
    lower_triangle_scores(scratch.grad_outputs, scratch.value_stride, scratch.transposed_values, scratch.responses,
                          chunk.rows, problem.value_width);
    lower_triangle_product(scratch.responses, chunk.gained, chunk.stride, scratch.received, chunk.stride, chunk.rows,
                           chunk.stride, finite_keys);
    finish_query_gradients(head, query_head, first, query_responses, scratch);
  });
}

// read_chunk_state() on the tile unit.
template <int kParts, int kValueParts>
static void split_read_chunk_state(const Head& head, int64_t first, int64_t end, float* query_responses,
                                   BackwardScratch& scratch) {
  const SplitBackward<kParts, kValueParts> split(scratch);
  split.load_forward();
  head.for_each_query_head([&](int64_t query_head) {
    load_grad_outputs(head, query_head, first, scratch.chunk.rows, scratch);
    Prefetches own = rows_of_query_head(head, query_head, first, end, scratch.chunk);
    split.multiply_state(own);
    finish_query_gradients(head, query_head, first, query_responses, scratch);
  });
}

// The chunk joins these channels of the transposed state.
template <int kParts, int kValueParts>
static void split_add_chunk(const Head& head, int64_t end, Channels channels, BackwardScratch& scratch) {
  const SplitBackward<kParts, kValueParts> split(scratch);
  Prefetches next = next_keys_and_values(head, end, scratch.chunk);
  split.join_state(channels, next);
}
// The same, of weights that are not in pairs yet.
template <int kParts, int kValueParts>
static void split_pair_and_add_chunk(const Head& head, int64_t end, Channels channels, BackwardScratch& scratch) {
  SplitBackward<kParts, kValueParts>(scratch).pair_weights(channels);
  split_add_chunk<kParts, kValueParts>(head, end, channels, scratch);
}
// G and r of these channels to the unit of the chunk, whose shift is at most theirs.
[[maybe_unused]] static void change_gradient_unit(const BackwardScratch& scratch, const float* shift,
                                                  Channels channels) {
  for (int64_t d = channels.begin; d < channels.end; ++d) {
    const float before = scratch.gradient_shift[d];
    if (before == shift[d]) continue;
    const float factor = shift[d] == -INFINITY ? 0.0f : change_of_unit(shift[d], before);
    scratch.gradient_shift[d] = shift[d];
    scratch.key_response[d] = factor == 0.0f ? 0.0 : scratch.key_response[d] * factor;
    scale_row(scratch.state_gradient + d * scratch.value_stride, factor, scratch.value_stride);
  }
}

// The keys' weights and the values transposed, as receive_from_head() reads them.
[[maybe_unused]] static void transpose_chunk(BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  transpose(chunk.gained, chunk.stride, scratch.transposed_keys, kChunkRows, padded(chunk.rows), chunk.stride);
  transpose(scratch.values, scratch.value_stride, scratch.transposed_values, kChunkRows, padded(chunk.rows),
            scratch.value_stride);
}

// What the rows of one query head add to dv and to G v within the chunk, from `queries` and `grad_outputs`.
[[maybe_unused]] static void receive_from_head(const Head& head, bool finite_queries, bool finite_outputs,
                                               BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const int rows = chunk.rows;
  lower_triangle_scores(scratch.queries, chunk.stride, scratch.transposed_keys, scratch.scores, rows,
                        problem.key_width);
  lower_triangle_scores(scratch.grad_outputs, scratch.value_stride, scratch.transposed_values, scratch.responses, rows,
                        problem.value_width);
  upper_triangle_product(scratch.scores, scratch.grad_outputs, scratch.value_stride, scratch.grad_values,
                         scratch.value_stride, rows, scratch.value_stride, finite_outputs);
  upper_triangle_product(scratch.responses, scratch.queries, chunk.stride, scratch.received_within, chunk.stride, rows,
                         chunk.stride, finite_queries);
}

// What they add to these channels of G.
[[maybe_unused]] static void add_head_to_gradient(const Head& head, bool finite_outputs, Channels channels,
                                                  BackwardScratch& scratch, Prefetches own = {}) {
  const KeyChunk& chunk = scratch.chunk;
  // From the last row to the first, as the recurrence has it: later rows weigh less, and small terms that are added
  // first are not lost beside large ones.
  const int64_t last = chunk.rows - 1, count = core::smaller(channels.end, head.problem.key_width) - channels.begin;
  accumulate_product(finite_outputs, {scratch.queries + last * chunk.stride + channels.begin, 1, -chunk.stride},
                     scratch.grad_outputs + last * scratch.value_stride, -scratch.value_stride,
                     scratch.state_gradient + channels.begin * scratch.value_stride, scratch.value_stride, count,
                     scratch.value_stride, chunk.rows, AskFor{own});
}

// dv and G v of a chunk whose keys and values are loaded; with `joins` what it adds to G. `kept` is asked for.
[[maybe_unused]] static void receive_chunk(const Head& head, int64_t first, int64_t begin, const float* kept,
                                           bool joins, BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  transpose_chunk(scratch);
  transpose_gradient(scratch);
  receive_from_later_rows(head, scratch, earlier_keys_and_values(head, begin, chunk, kept));
  head.for_each_query_head([&](int64_t query_head) {
    const bool finite_outputs = load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    const bool finite_queries =
        load_scaled_queries(head, query_head, first, chunk.rows, chunk.inverse, chunk.stride, scratch);
    receive_from_head(head, finite_queries, finite_outputs, scratch);
    if (joins)
      add_head_to_gradient(head, finite_outputs, {0, chunk.stride}, scratch,
                           earlier_rows_of_query_head(head, query_head, begin, chunk));
  });
}

// receive_chunk() on the tile unit.
template <int kParts, int kValueParts>
static void split_receive_chunk(const Head& head, int64_t first, int64_t begin, const float* kept, bool joins,
                                BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  const SplitBackward<kParts, kValueParts> split(scratch);
  Prefetches next = earlier_keys_and_values(head, begin, chunk, kept);
  split.receive_from_later_rows(next);
  head.for_each_query_head([&](int64_t query_head) {
    Prefetches own = earlier_rows_of_query_head(head, query_head, begin, chunk);
    const bool finite_outputs = load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    const bool finite_queries =
        load_scaled_queries(head, query_head, first, chunk.rows, chunk.inverse, chunk.stride, scratch);
    if (finite_outputs && finite_queries) {
      split.receive_from_head(own);
      if (joins) split.join_gradient({0, chunk.stride}, own);
      return;
    }
    transpose_chunk(scratch);
    receive_from_head(head, finite_queries, finite_outputs, scratch);
    if (joins) add_head_to_gradient(head, finite_outputs, {0, chunk.stride}, scratch);
  });
}

// What the rows of one query head, loaded and finite, add to these channels of G.
template <int kParts, int kValueParts>
static void split_add_head_to_gradient(Channels channels, BackwardScratch& scratch) {
  const SplitBackward<kParts, kValueParts> split(scratch);
  Prefetches nothing;
  split.pair_grad_outputs();
  split.join_gradient(channels, nothing);
}
}  // namespace sightline::SIGHTLINE_ISA_NS
