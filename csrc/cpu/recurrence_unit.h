// A unit of work of the additive recurrence's forward pass: one key head of one sequence and a block of value columns,
// with its part of the state, and how it goes between the tensors and the scratch memory of a thread.
#pragma once

#include "cpu/recurrence_chunk.h"
#include "cpu/recurrence_split.h"
#include "cpu/result_rows.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct Plan {
  const RecurrenceProblem* problem;
  int64_t block;   // value columns of a unit
  int64_t blocks;  // of a head
  Segments segments;
  Parts parts;

  Plan(const RecurrenceProblem& task, int threads)
      : problem(&task), segments(unordered_segments(task)), parts(split_parts(task)) {
    const int64_t width = padded(task.value_width);
    const int64_t heads = core::larger(task.sequences() * task.key_heads, 1);
    const int64_t units = heads * segments.count;
    const int64_t wanted = core::larger((threads + units - 1) / units, (width + kLargestBlock - 1) / kLargestBlock);
    // A block of fewer than two vectors leaves the products to wait for their own sums.
    block = core::larger(padded((width + wanted - 1) / wanted), 2 * Vec::kWidth);
    blocks = (width + block - 1) / block;
  }
};

struct ForwardScratch {
  TileUnit tile_unit;
  Allocation memory;
  KeyChunk chunk;
  SplitChunk split;
  Normalizer normalizer;
  float* transposed_keys;  // (padded Dk, kChunkRows)
  float* queries;          // (kChunkRows, padded Dk), divided by the normaliser
  float* scores;           // (kChunkRows, kChunkRows)
  float* values;           // (kChunkRows, stride)
  float* outputs;          // (kChunkRows, stride)
  float* state;            // (padded Dk, stride)

  int64_t carve(const Plan& plan, char* start) {
    Arena arena(start);
    chunk.carve(arena, *plan.problem);
    normalizer = {arena.take<float>(chunk.stride), arena.take<double>(chunk.stride)};
    transposed_keys = arena.take<float>(chunk.stride * kChunkRows);
    queries = arena.take<float>(chunk.stride * kChunkRows);
    scores = arena.take<float>(kChunkRows * kChunkRows);
    const int64_t stride = state_stride(plan.block);
    values = arena.take<float>(kChunkRows * stride);
    outputs = arena.take<float>(kChunkRows * stride);
    state = arena.take<float>(chunk.stride * stride);
    split.carve(arena, plan.parts, plan.problem->key_width, plan.block);
    return arena.used();
  }
  explicit ForwardScratch(const Plan& plan) : tile_unit(plan.parts.factors > 0), memory(carve(plan, nullptr)) {
    carve(plan, memory.get());
  }
};

struct Unit {
  Sequence sequence;
  int64_t key_head;
  int64_t column, columns;  // value columns of the tensors
  int64_t width, stride;    // their number with padding, and the distance of rows in the scratch

  int64_t state_row(const RecurrenceProblem& problem, int64_t d) const {
    return (sequence.index * problem.key_heads + key_head) * problem.key_width + d;
  }
};

[[maybe_unused]] static void start_state(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  // Segments after the first begin with nothing.
  const bool first = unit.sequence.begin == find_sequence(problem, unit.sequence.index).begin;
  const float* given = first ? problem.initial_log_normalizer : nullptr;
  scratch.normalizer.start(given == nullptr ? nullptr : given + unit.state_row(problem, 0), problem.key_width);
  for (int64_t d = 0; d < scratch.chunk.stride; ++d) {
    float* row = scratch.state + d * unit.stride;
    zero(row, unit.stride);
    if (given == nullptr || scratch.normalizer.sum[d] == 0.0) continue;
    const float* source = problem.initial_memory + unit.state_row(problem, d) * problem.value_width + unit.column;
    for (int64_t column = 0; column < unit.columns; ++column) row[column] = source[column];
  }
}

[[maybe_unused]] static void write_state(const RecurrenceProblem& problem, const Unit& unit,
                                         const ForwardScratch& scratch) {
  if (problem.final_memory == nullptr) return;
  for (int64_t d = 0; d < problem.key_width; ++d) {
    const float inverse = scratch.normalizer.inverse(d);
    float* target = problem.final_memory + unit.state_row(problem, d) * problem.value_width + unit.column;
    const float* row = scratch.state + d * unit.stride;
    for (int64_t column = 0; column < unit.columns; ++column) target[column] = row[column] * inverse;
    if (unit.column == 0)
      problem.final_log_normalizer[unit.state_row(problem, d)] = scratch.normalizer.log_normalizer(d);
  }
}

// A sequence without rows hands its state on as it came.
[[maybe_unused]] static void pass_state_on(const RecurrenceProblem& problem, const Unit& unit) {
  if (problem.final_memory == nullptr) return;
  const bool given = problem.initial_memory != nullptr;
  for (int64_t d = 0; d < problem.key_width; ++d) {
    const int64_t row = unit.state_row(problem, d);
    if (unit.column == 0) problem.final_log_normalizer[row] = given ? problem.initial_log_normalizer[row] : -INFINITY;
    for (int64_t column = row * problem.value_width + unit.column, left = unit.columns; left > 0; --left, ++column)
      problem.final_memory[column] = given ? problem.initial_memory[column] : 0.0f;
  }
}

SIGHTLINE_INLINE ResultRows outputs_of(const RecurrenceProblem& problem, const Unit& unit) {
  return {problem.output, problem.dtype, unit.column, unit.columns,
          problem.batch * problem.heads * problem.length * problem.value_width};
}

[[maybe_unused]] static void write_outputs(const RecurrenceProblem& problem, const Unit& unit, int64_t head,
                                           int64_t first, int rows, const ForwardScratch& scratch) {
  outputs_of(problem, unit).write(scratch.outputs, unit.stride, unit.sequence.batch, head, first, rows);
}

// Up to a chunk of rows from `first` on.
[[maybe_unused]] static Prefetch rows_from(const RecurrenceProblem& problem, const Unit& unit, const HeadsView& view,
                                           int64_t head, int64_t first, int64_t column, int64_t columns) {
  const int64_t size = element_size(problem.dtype);
  return {advance(row_of(view, problem.dtype, unit.sequence.batch, head, first), column, problem.dtype), columns * size,
          view.row_stride * size, core::smaller(kChunkRows, unit.sequence.end - first)};
}

// What is read of a head's next rows, and written of these.
[[maybe_unused]] static Prefetches next_queries_and_outputs(const RecurrenceProblem& problem, const Unit& unit,
                                                            int64_t head, int64_t first, int64_t rows) {
  return {{rows_from(problem, unit, problem.query, head, first + rows, 0, problem.key_width), {}},
          outputs_of(problem, unit).prefetch(unit.sequence.batch, head, first, rows)};
}

// Loads the next chunk: its keys' weights, and the state in the chunk's unit.
template <bool kRows, bool kRounded = false>
static void begin_chunk(const RecurrenceProblem& problem, const Unit& unit, int64_t first, ForwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  const int64_t batch = unit.sequence.batch;
  load_keys(problem, batch, unit.key_head, first,
            static_cast<int>(core::smaller(kChunkRows, unit.sequence.end - first)), chunk);
  if (lift_and_cut(chunk, scratch.normalizer))
    for (int64_t d = 0; d < problem.key_width; ++d)
      if (chunk.factors[d] != 1.0f) scale_row(scratch.state + d * unit.stride, chunk.factors[d], unit.stride);
  weigh_keys<kRows, kRounded>(problem, batch, unit.key_head, chunk, scratch.normalizer);
}

// What the next chunk will load.
[[maybe_unused]] static Prefetches next_keys_and_values(const RecurrenceProblem& problem, const Unit& unit,
                                                        const KeyChunk& chunk) {
  const int64_t next = chunk.first + chunk.rows;
  return {{rows_from(problem, unit, problem.key, unit.key_head, next, 0, problem.key_width),
           rows_from(problem, unit, problem.value, unit.key_head, next, unit.column, unit.columns)},
          {}};
}

// Whether all values of the chunk are finite.
[[maybe_unused]] static bool load_values(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  load_rows(problem.value, problem.dtype, unit.sequence.batch, unit.key_head, scratch.chunk.first, unit.column,
            scratch.chunk.rows, unit.columns, scratch.values, unit.stride);
  return is_finite(scratch.values, scratch.chunk.rows * unit.stride);
}

// The chunk joins these channels of the state.
[[maybe_unused]] static void add_chunk_to_state(const RecurrenceProblem& problem, const Unit& unit, bool finite,
                                                Channels channels, ForwardScratch& scratch) {
  const int64_t count = core::smaller(channels.end, problem.key_width) - channels.begin;
  Prefetches prefetches = next_keys_and_values(problem, unit, scratch.chunk);
  accumulate_product(finite, {scratch.chunk.gained + channels.begin, 1, scratch.chunk.stride}, scratch.values,
                     unit.stride, scratch.state + channels.begin * unit.stride, unit.stride, count, unit.width,
                     scratch.chunk.rows, AskFor{prefetches});
}

}  // namespace sightline::SIGHTLINE_ISA_NS
