// The additive linear recurrence, forward (MATH.md section 4).
//
// A unit of work is one key head of one sequence and a block of value columns: it walks the chunks of keys
// (recurrence_chunk.h) with its columns of the state in the second-level cache. The columns of a state do not know of
// each other, so however many blocks there are, the bits are the same; a head is cut into blocks only where there are
// fewer heads than threads, because every block computes the keys' weights and scores for itself. Per chunk, for every
// query head of the group: outputs from the state, scores within the chunk, outputs from those; then the chunk joins
// the state. A sequence of one row is one pass over the state instead (recurrence_step.h).
#include "cpu/kernel_table.h"
#include "cpu/recurrence_chunk.h"
#include "cpu/recurrence_step.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

constexpr int64_t kLargestBlock = 256;  // columns of a state that stay in the second-level cache at Dk = 512

struct Plan {
  const RecurrenceProblem* problem;
  int64_t block;   // value columns of a unit
  int64_t blocks;  // units of a head

  Plan(const RecurrenceProblem& task, int threads) : problem(&task) {
    const int64_t width = padded(task.value_width);
    const int64_t heads = core::larger(task.sequences() * task.key_heads, 1);
    const int64_t wanted = core::larger((threads + heads - 1) / heads, (width + kLargestBlock - 1) / kLargestBlock);
    // A block of fewer than two vectors leaves the products to wait for their own sums.
    block = core::larger(padded((width + wanted - 1) / wanted), 2 * Vec::kWidth);
    blocks = (width + block - 1) / block;
  }
};

struct ForwardScratch {
  Allocation memory;
  KeyChunk chunk;
  Normalizer normalizer;
  float* transposed_keys;  // (padded Dk, kChunkRows)
  float* queries;          // (kChunkRows, padded Dk), divided by the normaliser
  float* scores;           // (kChunkRows, kChunkRows)
  float* values;           // (kChunkRows, stride)
  float* outputs;          // (kChunkRows, stride)
  float* state;            // (Dk, stride)

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
    state = arena.take<float>(plan.problem->key_width * stride);
    return arena.used();
  }
  explicit ForwardScratch(const Plan& plan) : memory(carve(plan, nullptr)) { carve(plan, memory.get()); }
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

void start_state(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const float* given = problem.initial_log_normalizer;
  scratch.normalizer.start(given == nullptr ? nullptr : given + unit.state_row(problem, 0), problem.key_width);
  for (int64_t d = 0; d < problem.key_width; ++d) {
    float* row = scratch.state + d * unit.stride;
    zero(row, unit.stride);
    if (given == nullptr || scratch.normalizer.sum[d] == 0.0) continue;
    const float* source = problem.initial_memory + unit.state_row(problem, d) * problem.value_width + unit.column;
    for (int64_t column = 0; column < unit.columns; ++column) row[column] = source[column];
  }
}

void write_state(const RecurrenceProblem& problem, const Unit& unit, const ForwardScratch& scratch) {
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
void pass_state_on(const RecurrenceProblem& problem, const Unit& unit) {
  if (problem.final_memory == nullptr) return;
  const bool given = problem.initial_memory != nullptr;
  for (int64_t d = 0; d < problem.key_width; ++d) {
    const int64_t row = unit.state_row(problem, d);
    problem.final_log_normalizer[row] = given ? problem.initial_log_normalizer[row] : -INFINITY;
    for (int64_t column = row * problem.value_width + unit.column, left = unit.columns; left > 0; --left, ++column)
      problem.final_memory[column] = given ? problem.initial_memory[column] : 0.0f;
  }
}

// Queries of the chunk times `factors`, one row for all (stride 0) or one for each, times the scale.
void load_queries(const RecurrenceProblem& problem, const Unit& unit, int64_t head, int64_t first, int rows,
                  const float* factors, int64_t factor_stride, ForwardScratch& scratch) {
  const int64_t stride = scratch.chunk.stride;
  load_rows(problem.query, problem.dtype, unit.sequence.batch, head, first, 0, rows, problem.key_width, scratch.queries,
            stride);
  const Vec scale = Vec::broadcast(problem.scale);
  for (int row = 0; row < rows; ++row)
    for (int64_t d = 0; d < stride; d += Vec::kWidth) {
      float* entry = scratch.queries + row * stride + d;
      // Before the first key the output is 0, whatever the query.
      const Vec factor = Vec::load(factors + row * factor_stride + d);
      store(entry, select(equal(factor, Vec::broadcast(0.0f)), factor, Vec::load(entry) * factor * scale));
    }
}

void write_outputs(const RecurrenceProblem& problem, const Unit& unit, int64_t head, int64_t first, int rows,
                   const ForwardScratch& scratch) {
  for (int row = 0; row < rows; ++row)
    narrow(scratch.outputs + row * unit.stride,
           advance(writable_row_of(problem.output, problem.dtype, unit.sequence.batch, head, first + row), unit.column,
                   problem.dtype),
           problem.dtype, unit.columns);
}

// Loads the next chunk: its keys' weights, its values, the state in the chunk's unit. Whether all values are finite.
template <bool kRows>
bool begin_chunk(const RecurrenceProblem& problem, const Unit& unit, int64_t first, ForwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  const int64_t batch = unit.sequence.batch;
  load_keys(problem, batch, unit.key_head, first,
            static_cast<int>(core::smaller(kChunkRows, unit.sequence.end - first)), chunk);
  if (lift_and_cut(chunk, scratch.normalizer))
    for (int64_t d = 0; d < problem.key_width; ++d)
      if (chunk.factors[d] != 1.0f) scale_row(scratch.state + d * unit.stride, chunk.factors[d], unit.stride);
  weigh_keys<kRows>(problem, batch, unit.key_head, chunk, scratch.normalizer);
  load_rows(problem.value, problem.dtype, batch, unit.key_head, first, unit.column, chunk.rows, unit.columns,
            scratch.values, unit.stride);
  return is_finite(scratch.values, chunk.rows * unit.stride);
}

void add_chunk_to_state(const RecurrenceProblem& problem, const Unit& unit, bool finite, ForwardScratch& scratch) {
  accumulate_product(finite, {scratch.chunk.gained, 1, scratch.chunk.stride}, scratch.values, unit.stride,
                     scratch.state, unit.stride, problem.key_width, unit.width, scratch.chunk.rows);
}

void run_causal(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads;
  KeyChunk& chunk = scratch.chunk;
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += chunk.rows) {
    const bool finite = begin_chunk<true>(problem, unit, first, scratch);
    transpose(chunk.gained, chunk.stride, scratch.transposed_keys, kChunkRows, padded(chunk.rows), chunk.stride);
    for (int64_t head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
      load_queries(problem, unit, head, first, chunk.rows, chunk.inverse, chunk.stride, scratch);
      product<false>({scratch.queries, chunk.stride, 1}, scratch.state, unit.stride, scratch.outputs, unit.stride,
                     chunk.rows, unit.width, problem.key_width);
      lower_triangle_scores(scratch.queries, chunk.stride, scratch.transposed_keys, scratch.scores, chunk.rows,
                            problem.key_width);
      lower_triangle_product(scratch.scores, scratch.values, unit.stride, scratch.outputs, unit.stride, chunk.rows,
                             unit.width, finite);
      write_outputs(problem, unit, head, first, chunk.rows, scratch);
    }
    add_chunk_to_state(problem, unit, finite, scratch);
  }
}

void run_without_order(const RecurrenceProblem& problem, const Unit& unit, ForwardScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads;
  KeyChunk& chunk = scratch.chunk;
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += chunk.rows)
    add_chunk_to_state(problem, unit, begin_chunk<false>(problem, unit, first, scratch), scratch);
  for (int64_t d = 0; d < chunk.stride; ++d) chunk.inverse[d] = scratch.normalizer.inverse(d);
  for (int64_t first = unit.sequence.begin; first < unit.sequence.end; first += kChunkRows) {
    const int rows = static_cast<int>(core::smaller(kChunkRows, unit.sequence.end - first));
    for (int64_t head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
      load_queries(problem, unit, head, first, rows, chunk.inverse, 0, scratch);
      product<false>({scratch.queries, chunk.stride, 1}, scratch.state, unit.stride, scratch.outputs, unit.stride, rows,
                     unit.width, problem.key_width);
      write_outputs(problem, unit, head, first, rows, scratch);
    }
  }
}

void run_unit(const Plan& plan, int64_t index, ForwardScratch& scratch) {
  const RecurrenceProblem& problem = *plan.problem;
  const int64_t head = index / plan.blocks, column = index % plan.blocks * plan.block;
  Unit unit{find_sequence(problem, head / problem.key_heads),
            head % problem.key_heads,
            column,
            core::smaller(plan.block, problem.value_width - column),
            0,
            0};
  unit.width = padded(unit.columns);
  unit.stride = state_stride(unit.width);
  if (unit.sequence.begin == unit.sequence.end) return pass_state_on(problem, unit);
  start_state(problem, unit, scratch);
  if (problem.causal)
    run_causal(problem, unit, scratch);
  else
    run_without_order(problem, unit, scratch);
  write_state(problem, unit, scratch);
}

}  // namespace

void recurrence_forward(const RecurrenceProblem& problem, const Parallel& parallel) {
  if (problem.length == 1 && problem.cuts == nullptr) {
    for_each_unit<StepScratch>(parallel, problem.batch * problem.key_heads, problem,
                               [&problem](int64_t index, StepScratch& scratch) {
                                 run_step(problem, index / problem.key_heads, index % problem.key_heads, scratch);
                               });
    return;
  }
  const Plan plan(problem, parallel.threads);
  for_each_unit<ForwardScratch>(parallel, problem.sequences() * problem.key_heads * plan.blocks, plan,
                                [&plan](int64_t index, ForwardScratch& scratch) { run_unit(plan, index, scratch); });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
