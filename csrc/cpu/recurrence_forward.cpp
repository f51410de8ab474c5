// The additive linear recurrence, forward (MATH.md section 4).
//
// A unit of work is one key head of one sequence and a block of value columns: it walks the chunks of keys
// (recurrence_chunk.h) with its columns of the state in the second-level cache. The columns of a state do not know of
// each other, so however many blocks there are, the bits are the same; a head is cut into blocks only where there are
// fewer heads than threads, because every block computes the keys' weights and scores for itself. Where that pays, a
// long sequence of fewer heads than threads goes through all of them window by window (recurrence_windows.h), and
// without order its segments are units of their own (recurrence_segments.h). Per chunk, for every query head of the
// group: outputs from the state, scores within the chunk, outputs from those; then the chunk joins the state. A
// sequence of one row is one pass over the state instead (recurrence_step.h).
#include "cpu/kernel_table.h"
#include "cpu/recurrence_segments.h"
#include "cpu/recurrence_split_chunk.h"
#include "cpu/recurrence_step.h"
#include "cpu/recurrence_windows.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// Whether products can go into the tensor of the outputs, which has no padding: not a function of the blocks of values.
bool fits_products(const RecurrenceProblem& problem) {
  return problem.dtype == DType::kFloat32 && problem.value_width % Vec::kWidth == 0;
}

// Whether they do.
bool writes_in_place(const RecurrenceProblem& problem, const Unit& unit) {
  return fits_products(problem) && !outputs_of(problem, unit).past_caches;
}

float* output_rows(const RecurrenceProblem& problem, const Unit& unit, int64_t head, int64_t first) {
  return static_cast<float*>(writable_row_of(problem.output, problem.dtype, unit.sequence.batch, head, first)) +
         unit.column;
}

// The outputs of the chunk begun. Whether all of its values, which stay loaded, are finite.
bool read_chunk_rows(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads;
  const KeyChunk& chunk = scratch.chunk;
  const bool finite = load_values(problem, unit, scratch), in_place = writes_in_place(problem, unit);
  transpose(chunk.gained, chunk.stride, scratch.transposed_keys, kChunkRows, padded(chunk.rows), chunk.stride);
  for (int64_t head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
    load_scaled_queries(problem, unit.sequence.batch, head, chunk.first, chunk.rows, chunk.inverse, chunk.stride,
                        scratch.queries);
    Prefetches prefetches = next_queries_and_outputs(problem, unit, head, chunk.first, chunk.rows);
    float* outputs = in_place ? output_rows(problem, unit, head, chunk.first) : scratch.outputs;
    const int64_t stride = in_place ? problem.output.row_stride : unit.stride;
    product<false>({scratch.queries, chunk.stride, 1}, scratch.state, unit.stride, outputs, stride, chunk.rows,
                   unit.width, problem.key_width, AskFor{prefetches});
    lower_triangle_scores(scratch.queries, chunk.stride, scratch.transposed_keys, scratch.scores, chunk.rows,
                          problem.key_width);
    lower_triangle_product(scratch.scores, scratch.values, unit.stride, outputs, stride, chunk.rows, unit.width,
                           finite);
    if (!in_place) write_outputs(problem, unit, head, chunk.first, chunk.rows, scratch);
  }
  return finite;
}

template <int kParts, int kValueParts>
void run_causal(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const Channels all{0, scratch.chunk.stride};
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += scratch.chunk.rows) {
    begin_chunk<true>(problem, unit, first, scratch);
    if constexpr (kParts > 0)
      if (scratch.chunk.rows >= kLeastSplitRows) {
        const bool finite = split_read_chunk_rows<kParts, kValueParts>(problem, unit, scratch);
        split_add_chunk_to_state<kParts, kValueParts>(problem, unit, finite, all, scratch);
        continue;
      }
    const bool finite = read_chunk_rows(problem, unit, scratch);
    add_chunk_to_state(problem, unit, finite, all, scratch);
  }
}

// The state after all rows of the unit; with kRounded weights of bfloat16 in a single part.
template <int kParts, int kValueParts, bool kRounded>
void gather_rows(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += chunk.rows) {
    if constexpr (kRounded)
      if (split_gather_plain_chunk(problem, unit, first, scratch)) continue;
    begin_chunk<false, kRounded>(problem, unit, first, scratch);
    if constexpr (kParts > 0)
      if (chunk.rows >= kLeastSplitRows) {
        split_gather_chunk<kRounded ? 1 : kParts, kValueParts>(problem, unit, scratch);
        continue;
      }
    add_chunk_to_state(problem, unit, load_values(problem, unit, scratch), {0, chunk.stride}, scratch);
  }
}

template <int kParts, int kValueParts>
void gather(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  // Outputs of bfloat16 want no more than rounded weights divided by their own sum; a state does.
  if (kParts > 0 && kValueParts == 1 && problem.final_memory == nullptr)
    gather_rows<kParts, kValueParts, true>(problem, unit, scratch);
  else if (kParts == 1)
    gather_rows<0, 0, false>(problem, unit, scratch);
  else
    gather_rows<kParts, kValueParts, false>(problem, unit, scratch);
}

// read_out() where the state, not every query, is divided by the normaliser: queries stay where they are.
void read_out_of_queries_in_place(const RecurrenceProblem& problem, const Unit& unit, int64_t head, int64_t first,
                                  int rows, ForwardScratch& scratch) {
  const auto* queries =
      static_cast<const float*>(row_of(problem.query, problem.dtype, unit.sequence.batch, head, first));
  Prefetches prefetches = next_queries_and_outputs(problem, unit, head, first, rows);
  const bool in_place = writes_in_place(problem, unit);
  product<false>({queries, problem.query.row_stride, 1}, scratch.state, unit.stride,
                 in_place ? output_rows(problem, unit, head, first) : scratch.outputs,
                 in_place ? problem.output.row_stride : unit.stride, rows, unit.width, problem.key_width,
                 AskFor{prefetches});
  if (!in_place) write_outputs(problem, unit, head, first, rows, scratch);
}

// The outputs of the unit's rows from the state of the whole sequence, which is used up.
template <int kParts, int kValueParts>
void read_out(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads;
  KeyChunk& chunk = scratch.chunk;
  bool live = true;
  for (int64_t d = 0; d < chunk.stride; ++d) {
    chunk.inverse[d] = scratch.normalizer.inverse(d);
    live &= d >= problem.key_width || chunk.inverse[d] != 0.0f;
  }
  const bool split = kParts > 0 && live, divides_state = live && fits_products(problem);
  if constexpr (kParts > 0)
    if (split) split_whole_state<kValueParts>(problem, unit, scratch);
  for (int64_t d = 0; divides_state && d < problem.key_width; ++d) {
    const Vec factor = Vec::broadcast(chunk.inverse[d] * problem.scale);
    float* row = scratch.state + d * unit.stride;
    for (int64_t column = 0; column < unit.width; column += Vec::kWidth)
      store(row + column, Vec::load(row + column) * factor);
  }
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += kChunkRows) {
    const int rows = static_cast<int>(core::smaller(kChunkRows, unit.sequence.end - first));
    for (int64_t head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
      if constexpr (kParts > 0)
        if (split) {
          split_read_out<kValueParts>(problem, unit, head, first, rows, scratch);
          continue;
        }
      if (divides_state) {
        read_out_of_queries_in_place(problem, unit, head, first, rows, scratch);
        continue;
      }
      load_scaled_queries(problem, unit.sequence.batch, head, first, rows, chunk.inverse, 0, scratch.queries);
      Prefetches prefetches = next_queries_and_outputs(problem, unit, head, first, rows);
      product<false>({scratch.queries, chunk.stride, 1}, scratch.state, unit.stride, scratch.outputs, unit.stride, rows,
                     unit.width, problem.key_width, AskFor{prefetches});
      write_outputs(problem, unit, head, first, rows, scratch);
    }
  }
}

Unit unit_of(const Plan& plan, int64_t head, int64_t block) {
  const RecurrenceProblem& problem = *plan.problem;
  const int64_t column = block * plan.block;
  Unit unit{find_sequence(problem, head / problem.key_heads),
            head % problem.key_heads,
            column,
            core::smaller(plan.block, problem.value_width - column),
            0,
            0};
  unit.width = padded(unit.columns);
  unit.stride = state_stride(unit.width);
  return unit;
}

void run_unit(const Plan& plan, int64_t index, ForwardScratch& scratch) {
  const RecurrenceProblem& problem = *plan.problem;
  const Unit unit = unit_of(plan, index / plan.blocks, index % plan.blocks);
  if (unit.sequence.begin == unit.sequence.end) return pass_state_on(problem, unit);
  start_state(problem, unit, scratch);
  if (problem.causal) {
    with_parts(plan.parts,
               [&](auto parts, auto value_parts) { run_causal<parts, value_parts>(problem, unit, scratch); });
    write_state(problem, unit, scratch);
    return;
  }
  with_unordered_parts(plan.parts, [&](auto parts, auto value_parts) {
    gather<parts, value_parts>(problem, unit, scratch);
    write_state(problem, unit, scratch);
    read_out<parts, value_parts>(problem, unit, scratch);
  });
}

// A long sequence without order: every segment's state, those merged in order, every segment's outputs.
void run_segments(const Plan& plan, const Parallel& parallel) {
  const RecurrenceProblem& problem = *plan.problem;
  const int64_t columns = problem.batch * problem.key_heads * plan.blocks;
  const SegmentStates states(plan, columns);
  const auto segment_of = [&](int64_t index) {
    const int64_t column = index / plan.segments.count;
    Unit unit = unit_of(plan, column / plan.blocks, column % plan.blocks);
    unit.sequence.begin = index % plan.segments.count * plan.segments.rows;
    unit.sequence.end = core::smaller(problem.length, unit.sequence.begin + plan.segments.rows);
    return unit;
  };
  for_each_unit<ForwardScratch>(
      parallel, columns * plan.segments.count, plan, [&](int64_t index, ForwardScratch& scratch) {
        const Unit unit = segment_of(index);
        start_state(problem, unit, scratch);
        with_unordered_parts(plan.parts,
                             [&](auto parts, auto value_parts) { gather<parts, value_parts>(problem, unit, scratch); });
        states.put(index, scratch, unit.stride);
      });
  for_each_unit<NoScratch>(parallel, columns, plan, [&](int64_t column, NoScratch&) {
    const int64_t first = column * plan.segments.count;
    for (int64_t index = first + 1; index < first + plan.segments.count; ++index)
      states.merge(first, index, segment_of(index).stride);
  });
  for_each_unit<ForwardScratch>(
      parallel, columns * plan.segments.count, plan, [&](int64_t index, ForwardScratch& scratch) {
        const Unit unit = segment_of(index);
        states.get(index / plan.segments.count * plan.segments.count, unit.stride, scratch);
        if (unit.sequence.begin == 0) write_state(problem, unit, scratch);
        with_unordered_parts(
            plan.parts, [&](auto parts, auto value_parts) { read_out<parts, value_parts>(problem, unit, scratch); });
      });
}

// Keeps these channels of the state before a chunk, which then joins them.
template <int kParts, int kValueParts>
void advance_chunk(const RecurrenceProblem& problem, const Unit& unit, Channels channels, float* before,
                   ForwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  const int64_t begin = channels.begin * unit.stride, size = (channels.end - channels.begin) * unit.stride;
  for (int64_t d = channels.begin; d < channels.end; ++d)
    if (chunk.factors[d] != 1.0f) scale_row(scratch.state + d * unit.stride, chunk.factors[d], unit.stride);
  std::memcpy(before + begin, scratch.state + begin, static_cast<size_t>(size) * sizeof(float));
  if (kParts > 0 && chunk.rows >= kLeastSplitRows) {
    const bool finite = load_split_values<kValueParts>(problem, unit, scratch);
    split_add_chunk_to_state<kParts, kValueParts>(problem, unit, finite, channels, scratch);
  } else {
    add_chunk_to_state(problem, unit, load_values(problem, unit, scratch), channels, scratch);
  }
}

// One unit with all threads, window by window.
template <int kParts, int kValueParts>
void run_windows(const Plan& plan, const Unit& unit, const Parallel& parallel) {
  const RecurrenceProblem& problem = *plan.problem;
  const FlushDenormals mode;
  ForwardScratch own(plan);
  ScratchPool<ForwardScratch> pool(plan, parallel.threads);
  start_state(problem, unit, own);
  Window window(problem, own.chunk.stride * unit.stride, parallel.threads);
  window.after.copy_from(own.normalizer, problem.key_width);
  const ChannelBlocks blocks(own.chunk.stride, parallel.threads);
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first = window.end) {
    window.begin_at(first);
    pool.for_each(parallel, blocks.count, [&](int64_t index, ForwardScratch& scratch) {
      const KeyChunk chunk = scratch.chunk;
      float* state = scratch.state;
      scratch.state = own.state;
      const Channels channels = blocks.channels(index);
      weigh_window(problem, unit.sequence, unit.key_head, channels, chunk, scratch.normalizer, window,
                   [&](int position, const KeyChunk& weighed) {
                     scratch.chunk = weighed;
                     advance_chunk<kParts, kValueParts>(problem, unit, channels, window.state_before(position),
                                                        scratch);
                   });
      scratch.chunk = chunk;
      scratch.state = state;
    });
    pool.for_each(parallel, window.count, [&](int64_t index, ForwardScratch& scratch) {
      const KeyChunk chunk = scratch.chunk;
      float* state = scratch.state;
      scratch.chunk = window.chunks[index];
      scratch.state = window.state_before(index);
      if (kParts > 0 && scratch.chunk.rows >= kLeastSplitRows)
        split_read_chunk_rows<kParts, kValueParts>(problem, unit, scratch);
      else
        read_chunk_rows(problem, unit, scratch);
      scratch.chunk = chunk;
      scratch.state = state;
    });
  }
  own.normalizer.copy_from(window.after, problem.key_width);
  write_state(problem, unit, own);
}

}  // namespace

void recurrence_forward(const RecurrenceProblem& problem, const Parallel& parallel) {
  if (problem.length == 1 && problem.cuts == nullptr) {
    // The next step reads the states that this one writes.
    for_each_unit<StepScratch>(
        parallel, problem.batch * problem.key_heads, problem,
        [&problem](int64_t index, StepScratch& scratch) {
          run_step(problem, index / problem.key_heads, index % problem.key_heads, scratch);
        },
        Handout::kSharesFirst);
    return;
  }
  const Plan plan(problem, parallel.threads);
  const bool fast = plan.parts.factors > 0;
  if (suits_windows(problem, parallel.threads, fast || plan.blocks > 1 ? kMostWindowShare : kMostSlowWindowShare)) {
    const Plan whole(problem, 1);
    for (int64_t index = 0; index < problem.sequences() * problem.key_heads * whole.blocks; ++index) {
      const Unit unit = unit_of(whole, index / whole.blocks, index % whole.blocks);
      if (unit.sequence.begin == unit.sequence.end)
        pass_state_on(problem, unit);
      else
        with_parts(whole.parts, [&](auto parts, auto values) { run_windows<parts, values>(whole, unit, parallel); });
    }
    return;
  }
  if (plan.segments.count > 1) return run_segments(plan, parallel);
  for_each_unit<ForwardScratch>(parallel, problem.sequences() * problem.key_heads * plan.blocks, plan,
                                [&plan](int64_t index, ForwardScratch& scratch) { run_unit(plan, index, scratch); });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
