// The additive linear recurrence, backward (MATH.md section 4).
//
// A unit of work is one key head of one sequence. A sweep forward walks the chunks as the forward pass does, with the
// state transposed, and gives dq; a sweep back carries G and r, in the unit of the chunk that it is in, and gives dx,
// dv and the gain's gradient. No gradient of a gate is formed. Between the sweeps stand, for one segment of rows, the
// chunks' normalisers and q dq per row and channel; a longer sequence takes its segments from the last to the first,
// each from a state stored on a first walk, so that memory does not grow with the sequence but for one state per
// segment. With order, chunks of 16-bit inputs go through the tile unit where there is one
// (recurrence_split_backward.h). Without order there are three walks over the rows (recurrence_unordered_backward.h),
// each over all segments of a long sequence at once.
#include "cpu/kernel_table.h"
#include "cpu/recurrence_gradient_segments.h"
#include "cpu/recurrence_split_backward.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// C += A^T B where only the entries of A (rows, rows) on and below the diagonal are set, and the others become 0 here.
void upper_triangle_product(float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int rows,
                            int64_t columns, bool finite) {
  for (int begin = 0; begin < rows; begin += kTriangleRows) {
    const int end = begin + kTriangleRows < rows ? begin + kTriangleRows : rows;
    for (int row = begin; row < end; ++row) zero(a + row * kChunkRows + row + 1, end - row - 1);
    accumulate_product(finite, {a + begin * kChunkRows + begin, 1, kChunkRows}, b + begin * b_stride, b_stride,
                       c + begin * c_stride, c_stride, end - begin, columns, rows - begin);
  }
}

// Whether the chunk's products may go through the tile unit.
[[maybe_unused]] bool suits_tile_unit(const BackwardScratch& scratch, bool finite_values) {
  const KeyChunk& chunk = scratch.chunk;
  return chunk.rows >= kLeastSplitRows && finite_values && is_finite(chunk.gained, chunk.rows * chunk.stride);
}

// Walks `begin` to `end` for the state alone.
void advance_state(const Head& head, int64_t begin, int64_t end, BackwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  for (int64_t first = begin; first < end; first += chunk.rows) {
    open_chunk(head, first, end, scratch);
    weigh_keys<false>(head.problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    add_chunk_to_transposed_state(head, load_values(head, first, chunk.rows, scratch), scratch);
  }
}

// dq = scale / Delta_t (S do_t), written, and q dq / Delta added to what the segment keeps of its rows.
void finish_query_gradients(const Head& head, int64_t query_head, int64_t first, float* query_responses,
                            BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const bool first_of_group = query_head % head.group() == 0;
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
      store(response + d, first_of_group ? product : product + Vec::load(response + d));
    }
    narrow(gradient,
           writable_row_of(head.gradients.grad_query, problem.dtype, head.sequence.batch, query_head, first + row),
           problem.dtype, problem.key_width);
  }
}

// The sweep forward over a chunk: dq, and the state after it.
void run_forward(const Head& head, int64_t first, bool finite_values, float* query_responses,
                 BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const bool finite_keys = is_finite(chunk.gained, chunk.rows * chunk.stride);
  transpose(scratch.values, scratch.value_stride, scratch.transposed_values, kChunkRows, padded(chunk.rows),
            scratch.value_stride);
  head.for_each_query_head([&](int64_t query_head) {
    load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    product<false>({scratch.grad_outputs, scratch.value_stride, 1}, scratch.transposed_state, chunk.stride,
                   scratch.received, chunk.stride, chunk.rows, chunk.stride, problem.value_width);
    lower_triangle_scores(scratch.grad_outputs, scratch.value_stride, scratch.transposed_values, scratch.responses,
                          chunk.rows, problem.value_width);
    lower_triangle_product(scratch.responses, chunk.gained, chunk.stride, scratch.received, chunk.stride, chunk.rows,
                           chunk.stride, finite_keys);
    finish_query_gradients(head, query_head, first, query_responses, scratch);
  });
  add_chunk_to_transposed_state(head, finite_values, scratch);
}

// Up to a chunk of rows of a tensor, from `first` on and within begin to end.
Prefetch rows_from(const Head& head, const HeadsView& view, int64_t of_head, int64_t first, int64_t begin, int64_t end,
                   int64_t width) {
  const DType dtype = head.problem.dtype;
  const int64_t start = core::larger(first, begin), stop = core::smaller(first + kChunkRows, end);
  if (start >= stop) return {};
  return {row_of(view, dtype, head.sequence.batch, of_head, start), width * element_size(dtype),
          view.row_stride * element_size(dtype), stop - start};
}

// run_forward() on the tile unit.
template <int kParts, int kValueParts>
void split_run_forward(const Head& head, int64_t first, int64_t end, float* query_responses, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const SplitBackward<kParts, kValueParts> split(scratch);
  const int64_t after = first + scratch.chunk.rows;
  split.load_forward();
  head.for_each_query_head([&](int64_t query_head) {
    load_grad_outputs(head, query_head, first, scratch.chunk.rows, scratch);
    Prefetches own{{rows_from(head, problem.query, query_head, first, first, after, problem.key_width),
                    rows_from(head, head.gradients.grad_output, query_head, after, after, end, problem.value_width)},
                   rows_from(head, head.gradients.grad_query, query_head, first, first, after, problem.key_width)};
    split.multiply_state(own);
    finish_query_gradients(head, query_head, first, query_responses, scratch);
  });
  Prefetches next{{rows_from(head, problem.key, head.key_head, after, after, end, problem.key_width),
                   rows_from(head, problem.value, head.key_head, after, after, end, problem.value_width)},
                  {}};
  split.join_state(next);
}

// The sweep forward over a segment; returns its number of chunks.
template <int kParts, int kValueParts>
int64_t sweep_forward(const Head& head, int64_t begin, int64_t end, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  int64_t chunks = 0;
  for (int64_t first = begin; first < end; first += chunk.rows, ++chunks) {
    open_chunk(head, first, end, scratch);
    scratch.chunk_rows[chunks] = chunk.rows;
    scratch.chunk_start(chunks).copy_from(scratch.normalizer, problem.key_width);
    weigh_keys<true>(problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    const bool finite_values = load_values(head, first, chunk.rows, scratch);
    float* query_responses = scratch.query_responses + (first - begin) * chunk.stride;
    if constexpr (kParts > 0)
      if (suits_tile_unit(scratch, finite_values)) {
        split_run_forward<kParts, kValueParts>(head, first, end, query_responses, scratch);
        continue;
      }
    run_forward(head, first, finite_values, query_responses, scratch);
  }
  return chunks;
}

// G and r to the unit of the chunk, whose shift is at most theirs.
void change_gradient_unit(BackwardScratch& scratch, const float* shift) {
  for (int64_t d = 0; d < scratch.chunk.stride; ++d) {
    const float before = scratch.gradient_shift[d];
    if (before == shift[d]) continue;
    const float factor = shift[d] == -INFINITY ? 0.0f : change_of_unit(shift[d], before);
    scratch.gradient_shift[d] = shift[d];
    scratch.key_response[d] = factor == 0.0f ? 0.0 : scratch.key_response[d] * factor;
    scale_row(scratch.state_gradient + d * scratch.value_stride, factor, scratch.value_stride);
  }
}

// The keys' weights and the values transposed, as receive_from_head() reads them.
void transpose_chunk(BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  transpose(chunk.gained, chunk.stride, scratch.transposed_keys, kChunkRows, padded(chunk.rows), chunk.stride);
  transpose(scratch.values, scratch.value_stride, scratch.transposed_values, kChunkRows, padded(chunk.rows),
            scratch.value_stride);
}

// What the rows of one query head add to dv, to G v within the chunk, and to G, from `queries` and `grad_outputs`.
void receive_from_head(const Head& head, bool finite_queries, bool finite_outputs, BackwardScratch& scratch) {
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
  // From the last row to the first, as the recurrence has it: later rows weigh less, and small terms that are added
  // first are not lost beside large ones.
  const int64_t last = rows - 1;
  accumulate_product(finite_outputs, {scratch.queries + last * chunk.stride, 1, -chunk.stride},
                     scratch.grad_outputs + last * scratch.value_stride, -scratch.value_stride, scratch.state_gradient,
                     scratch.value_stride, problem.key_width, scratch.value_stride, rows);
}

// The sweep back over a chunk whose keys and values are loaded: dv, G v and G.
void run_back(const Head& head, int64_t first, BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  transpose_chunk(scratch);
  transpose_gradient(scratch);
  receive_from_later_rows(head, scratch);
  head.for_each_query_head([&](int64_t query_head) {
    const bool finite_outputs = load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    const bool finite_queries =
        load_scaled_queries(head, query_head, first, chunk.rows, chunk.inverse, chunk.stride, scratch);
    receive_from_head(head, finite_queries, finite_outputs, scratch);
  });
}

// run_back() on the tile unit.
template <int kParts, int kValueParts>
void split_run_back(const Head& head, int64_t first, int64_t begin, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  const KeyChunk& chunk = scratch.chunk;
  const int64_t before = first - kChunkRows, end = first + chunk.rows;
  const SplitBackward<kParts, kValueParts> split(scratch);
  Prefetches next{{rows_from(head, problem.key, head.key_head, before, begin, first, problem.key_width),
                   rows_from(head, problem.value, head.key_head, before, begin, first, problem.value_width)},
                  rows_from(head, gradients.grad_key, head.key_head, first, begin, end, problem.key_width)};
  split.receive_from_later_rows(next);
  head.for_each_query_head([&](int64_t query_head) {
    Prefetches own{{rows_from(head, problem.query, query_head, before, begin, first, problem.key_width),
                    rows_from(head, gradients.grad_output, query_head, before, begin, first, problem.value_width)},
                   rows_from(head, gradients.grad_value, head.key_head, first, begin, end, problem.value_width)};
    const bool finite_outputs = load_grad_outputs(head, query_head, first, chunk.rows, scratch);
    const bool finite_queries =
        load_scaled_queries(head, query_head, first, chunk.rows, chunk.inverse, chunk.stride, scratch);
    if (finite_outputs && finite_queries) return split.receive_from_head(own);
    transpose_chunk(scratch);
    receive_from_head(head, finite_queries, finite_outputs, scratch);
  });
}

// The sweep back over a segment that the sweep forward has just walked.
template <int kParts, int kValueParts>
void sweep_back(const Head& head, int64_t begin, int64_t end, int64_t chunks, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  int64_t first = end;
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int rows = scratch.chunk_rows[index];
    first -= rows;
    load_keys(problem, head.sequence.batch, head.key_head, first, rows, chunk);
    const Normalizer start = scratch.chunk_start(index);
    change_gradient_unit(scratch, start.shift);
    weigh_keys<true>(problem, head.sequence.batch, head.key_head, chunk, start);
    const bool finite_values = load_values(head, first, rows, scratch);
    zero(scratch.received_within, rows * chunk.stride);
    bool split = false;
    if constexpr (kParts > 0) {
      split = suits_tile_unit(scratch, finite_values);
      if (split) split_run_back<kParts, kValueParts>(head, first, begin, scratch);
    }
    if (!split) run_back(head, first, scratch);
    write_key_gradients(head, scratch.query_responses + (first - begin) * chunk.stride, scratch);
  }
}

template <int kParts, int kValueParts>
void run_causal(const Head& head, BackwardScratch& scratch) {
  const Sequence& sequence = head.sequence;
  const int64_t segments = (sequence.end - sequence.begin + kKeptRows - 1) / kKeptRows;
  const int64_t state_size = scratch.value_stride * scratch.chunk.stride;
  const auto segment_begin = [&](int64_t segment) { return sequence.begin + segment * kKeptRows; };
  start_transposed_state(head, true, scratch);
  for (int64_t segment = 0; segment + 1 < segments; ++segment) {
    scratch.segment_start(segment).copy_from(scratch.normalizer, head.problem.key_width);
    __builtin_memcpy(scratch.segment_states + segment * state_size, scratch.transposed_state,
                     static_cast<size_t>(state_size) * sizeof(float));
    advance_state(head, segment_begin(segment), segment_begin(segment + 1), scratch);
  }
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t begin = segment_begin(segment), end = core::smaller(segment_begin(segment + 1), sequence.end);
    if (segment + 1 < segments) {
      scratch.normalizer.copy_from(scratch.segment_start(segment), head.problem.key_width);
      __builtin_memcpy(scratch.transposed_state, scratch.segment_states + segment * state_size,
                       static_cast<size_t>(state_size) * sizeof(float));
    }
    const int64_t chunks = sweep_forward<kParts, kValueParts>(head, begin, end, scratch);
    if (segment + 1 == segments) {
      zero(scratch.state_gradient, state_size);
      start_gradient(head, scratch);
    }
    sweep_back<kParts, kValueParts>(head, begin, end, chunks, scratch);
  }
  write_initial_gradients(head, scratch);
}

// A sequence without rows: the initial state receives what the final state has.
void pass_gradients_on(const Head& head) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  if (gradients.grad_initial_memory == nullptr) return;
  for (int64_t row = head.state_row(0); row < head.state_row(problem.key_width); ++row) {
    gradients.grad_initial_log_normalizer[row] =
        gradients.grad_log_normalizer == nullptr ? 0.0f : gradients.grad_log_normalizer[row];
    for (int64_t index = row * problem.value_width; index < (row + 1) * problem.value_width; ++index)
      gradients.grad_initial_memory[index] = gradients.grad_memory == nullptr ? 0.0f : gradients.grad_memory[index];
  }
}

// A long sequence without order, walk by walk.
template <int kParts, int kValueParts>
void run_segments(const BackwardPlan& plan, const Parallel& parallel) {
  const RecurrenceProblem& problem = *plan.problem;
  const int64_t heads = problem.batch * problem.key_heads, segments = plan.unordered.count;
  const SegmentGradients between(plan, heads * segments);
  const auto head_of = [&](int64_t index) {
    return Head{problem, *plan.gradients, find_sequence(problem, index / problem.key_heads), index % problem.key_heads};
  };
  const auto segment_of = [&](int64_t index) {
    Sequence sequence = head_of(index / segments).sequence;
    sequence.begin = index % segments * plan.unordered.rows;
    sequence.end = core::smaller(problem.length, sequence.begin + plan.unordered.rows);
    return Head{problem, *plan.gradients, sequence, index / segments % problem.key_heads};
  };
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    const Head segment = segment_of(index);
    start_transposed_state(segment, index % segments == 0, scratch);
    gather_state<kParts, kValueParts>(segment, scratch);
    between.put_state(index, scratch);
  });
  for (int64_t first = 0; first < heads * segments; first += segments)
    for (int64_t index = first + 1; index < first + segments; ++index) between.merge_states(first, index);
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    between.get_state(index / segments * segments, scratch);
    read_rows<kParts, kValueParts>(segment_of(index), scratch);
    between.put_gradient(index, scratch);
  });
  for_each_unit<BackwardScratch>(parallel, heads, plan, [&](int64_t head, BackwardScratch& scratch) {
    const int64_t first = head * segments;
    between.get_state(first, scratch);
    zero(scratch.state_gradient, scratch.chunk.stride * scratch.value_stride);
    for (int64_t index = first; index < first + segments; ++index) between.add_gradient(index, scratch);
    finish_state_gradient(head_of(head), scratch);
    between.put_gradient(first, scratch);
  });
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    between.get_gradient(index / segments * segments, scratch);
    give_to_rows<kParts, kValueParts>(segment_of(index), scratch);
  });
}

}  // namespace

void recurrence_backward(const RecurrenceProblem& problem, const RecurrenceGradients& gradients,
                         const Parallel& parallel) {
  const BackwardPlan plan(problem, gradients);
  if (plan.unordered.count > 1)
    return with_unordered_parts(plan.parts,
                                [&](auto parts, auto values) { run_segments<parts, values>(plan, parallel); });
  for_each_unit<BackwardScratch>(
      parallel, problem.sequences() * problem.key_heads, plan, [&plan](int64_t index, BackwardScratch& scratch) {
        const RecurrenceProblem& task = *plan.problem;
        const Head head{task, *plan.gradients, find_sequence(task, index / task.key_heads), index % task.key_heads};
        if (head.sequence.begin == head.sequence.end)
          pass_gradients_on(head);
        else if (task.causal)
          with_parts(plan.parts, [&](auto parts, auto values) { run_causal<parts, values>(head, scratch); });
        else
          with_unordered_parts(plan.parts,
                               [&](auto parts, auto values) { run_without_order<parts, values>(head, scratch); });
      });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
