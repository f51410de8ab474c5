// What both backward passes of the additive recurrence (with and without order) work with: scratch memory of a head,
// loading its rows, and turning what a key and a value receive into gradients (MATH.md section 4, "Backward").
#pragma once

#include "cpu/recurrence_chunk.h"
#include "cpu/recurrence_split.h"
#include "cpu/result_rows.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct BackwardPlan {
  const RecurrenceProblem* problem;
  const RecurrenceGradients* gradients;
  int64_t longest;   // sequence
  int64_t segments;  // of the longest sequence, with order
  Segments unordered;
  Parts parts;

  BackwardPlan(const RecurrenceProblem& task, const RecurrenceGradients& wanted)
      : problem(&task), gradients(&wanted), unordered(unordered_segments(task)), parts(split_parts(task)) {
    // Weights, state and G of bfloat16 without order are rounded once for many rows, which all read the same.
    if (!task.causal && parts.values == 1) parts.factors = 1;
    longest = 0;
    for (int64_t index = 0; index < task.sequences(); ++index) {
      const Sequence sequence = find_sequence(task, index);
      longest = core::larger(longest, sequence.end - sequence.begin);
    }
    segments = core::larger(1, (longest + kKeptRows - 1) / kKeptRows);
  }

  // The same for threads that keep nothing from row to row.
  BackwardPlan without_rows() const {
    BackwardPlan plan = *this;
    plan.longest = 0;
    plan.segments = 1;
    return plan;
  }
};

// The head of a sequence, and where it stands in the state tensors.
struct Head {
  const RecurrenceProblem& problem;
  const RecurrenceGradients& gradients;
  Sequence sequence;
  int64_t key_head;

  int64_t state_row(int64_t d) const { return (sequence.index * problem.key_heads + key_head) * problem.key_width + d; }
  int64_t group() const { return problem.heads / problem.key_heads; }
  // What the sweep forward keeps for the sweep back.
  int64_t kept_bytes() const {
    return core::smaller(sequence.end - sequence.begin, kKeptRows) * padded(problem.key_width) *
           element_size(DType::kFloat32);
  }
  template <class Run>
  void for_each_query_head(Run run) const {
    for (int64_t query_head = key_head * group(); query_head < (key_head + 1) * group(); ++query_head) run(query_head);
  }
  ResultRows grad_queries() const { return rows_of(gradients.grad_query, problem.heads, problem.key_width); }
  ResultRows grad_keys() const { return rows_of(gradients.grad_key, problem.key_heads, problem.key_width); }
  ResultRows grad_values() const { return rows_of(gradients.grad_value, problem.key_heads, problem.value_width); }
  const float* initial_log_normalizer() const {
    return problem.initial_log_normalizer == nullptr ? nullptr : problem.initial_log_normalizer + state_row(0);
  }
  // Row d of a state tensor (sequences, Hk, Dk, Dv), null where there is none.
  const float* memory_row(const float* memory, int64_t d) const {
    return memory == nullptr ? nullptr : memory + state_row(d) * problem.value_width;
  }

 private:
  ResultRows rows_of(const HeadsView& view, int64_t heads, int64_t width) const {
    return {view, problem.dtype, 0, width, problem.batch * heads * problem.length * width};
  }
};

// The operands of a chunk's products of pairs (recurrence_split_backward.h), in parts of bfloat16: `rows` as
// they lie, `columns` transposed, `pairs` of rows and `lanes` as the second factor.
struct SplitGradients {
  int64_t key_depth, value_depth;  // Dk and Dv, padded for products over them
  uint16_t* key_rows;              // (parts, kChunkRows, key_depth): of the keys' weights, then of the queries
  uint16_t* query_columns;         // (parts, padded Dk, kChunkRows)
  uint32_t* query_pairs;           // (parts, padded Dk / 16, kChunkRows / 2, 16)
  uint32_t* gained_pairs;          // likewise
  uint32_t* gained_lanes;          // (parts, kChunkRows / 16, key_depth / 2, 16)
  uint16_t* value_rows;            // (value parts, kChunkRows, value_depth)
  uint16_t* value_columns;         // (value parts, padded Dv, kChunkRows)
  uint32_t* value_lanes;           // (value parts, kChunkRows / 16, value_depth / 2, 16)
  uint16_t* grad_rows;             // (value parts, kChunkRows, value_depth)
  uint32_t* grad_pairs;            // (value parts, padded Dv / 16, kChunkRows / 2, 16)
  uint32_t* state;                 // the state or G, either way round
  uint32_t* transposed_gradient;   // G transposed, without order
  uint16_t* triangle;              // (parts, kChunkRows, kChunkRows)

  void carve(Arena& arena, Parts of, const RecurrenceProblem& problem) {
    const int64_t keys = padded(problem.key_width), values = padded(problem.value_width), parts = of.factors;
    key_depth = core::round_up(problem.key_width, kPairDepth);
    value_depth = core::round_up(problem.value_width, kPairDepth);
    if (parts == 0) return;
    key_rows = arena.take<uint16_t>(parts * kChunkRows * key_depth);
    query_columns = arena.take<uint16_t>(parts * keys * kChunkRows);
    query_pairs = arena.take<uint32_t>(parts * keys * kChunkRows / 2);
    gained_pairs = arena.take<uint32_t>(parts * keys * kChunkRows / 2);
    gained_lanes = arena.take<uint32_t>(parts * key_depth * kChunkRows / 2);
    value_rows = arena.take<uint16_t>(of.values * kChunkRows * value_depth);
    value_columns = arena.take<uint16_t>(of.values * values * kChunkRows);
    value_lanes = arena.take<uint32_t>(of.values * value_depth * kChunkRows / 2);
    grad_rows = arena.take<uint16_t>(of.values * kChunkRows * value_depth);
    grad_pairs = arena.take<uint32_t>(of.values * values * kChunkRows / 2);
    state = arena.take<uint32_t>(parts * core::larger(key_depth * values, value_depth * keys) / 2);
    transposed_gradient = arena.take<uint32_t>(problem.causal ? 0 : parts * value_depth * keys / 2);
    triangle = arena.take<uint16_t>(parts * kChunkRows * kChunkRows);
  }
};

struct BackwardScratch {
  TileUnit tile_unit;
  Allocation memory;
  int64_t value_stride;  // padded Dv
  KeyChunk chunk;
  SplitGradients split;
  Normalizer normalizer;
  float* transposed_keys;      // (padded Dk, kChunkRows)
  float* transposed_values;    // (padded Dv, kChunkRows)
  float* queries;              // (kChunkRows, padded Dk)
  float* scores;               // (kChunkRows, kChunkRows): <q_u, k_t>
  float* responses;            // (kChunkRows, kChunkRows): <do_u, v_t>
  float* values;               // (kChunkRows, padded Dv)
  float* grad_outputs;         // (kChunkRows, padded Dv)
  float* grad_values;          // (kChunkRows, padded Dv)
  float* received;             // (kChunkRows, padded Dk): G v of the rows after the chunk, and dq on the way there
  float* received_within;      // (kChunkRows, padded Dk): what the chunk's own rows add to it
  float* transposed_state;     // (padded Dv, padded Dk): the state, transposed
  float* state_gradient;       // (padded Dk, padded Dv): G in the chunk's unit
  float* transposed_gradient;  // (padded Dv, padded Dk)
  float* gradient_shift;       // (padded Dk): the unit of the two
  double* key_response;        // (padded Dk): r in the chunk's unit
  float* query_responses;      // (segment rows, padded Dk): q dq / Delta, summed over the query heads of the group
  int32_t* chunk_rows;         // (segment rows): of every chunk of the segment, and the normaliser before it
  float* chunk_shifts;         // (segment rows, padded Dk), of which only the chunks' are touched
  double* chunk_sums;          // likewise
  float* segment_states;       // (segments, padded Dv, padded Dk)
  float* segment_shifts;       // (segments, padded Dk)
  double* segment_sums;

  int64_t carve(const BackwardPlan& plan, char* start) {
    Arena arena(start);
    const RecurrenceProblem& problem = *plan.problem;
    chunk.carve(arena, problem);
    const int64_t keys = chunk.stride, width = value_stride = padded(problem.value_width);
    normalizer = {arena.take<float>(keys), arena.take<double>(keys)};
    transposed_keys = arena.take<float>(keys * kChunkRows);
    transposed_values = arena.take<float>(width * kChunkRows);
    queries = arena.take<float>(keys * kChunkRows);
    scores = arena.take<float>(kChunkRows * kChunkRows);
    responses = arena.take<float>(kChunkRows * kChunkRows);
    values = arena.take<float>(width * kChunkRows);
    grad_outputs = arena.take<float>(width * kChunkRows);
    grad_values = arena.take<float>(width * kChunkRows);
    received = arena.take<float>(keys * kChunkRows);
    received_within = arena.take<float>(keys * kChunkRows);
    transposed_state = arena.take<float>(width * keys);
    state_gradient = arena.take<float>(keys * width);
    transposed_gradient = arena.take<float>(width * keys);
    gradient_shift = arena.take<float>(keys);
    key_response = arena.take<double>(keys);
    const int64_t rows = problem.causal ? core::smaller(plan.longest, kKeptRows) : 0;
    query_responses = arena.take<float>(rows * keys);
    chunk_rows = arena.take<int32_t>(rows);
    chunk_shifts = arena.take<float>(rows * keys);
    chunk_sums = arena.take<double>(rows * keys);
    const int64_t segments = problem.causal && plan.segments > 1 ? plan.segments : 0;
    segment_states = arena.take<float>(segments * width * keys);
    segment_shifts = arena.take<float>(segments * keys);
    segment_sums = arena.take<double>(segments * keys);
    split.carve(arena, plan.parts, problem);
    return arena.used();
  }
  explicit BackwardScratch(const BackwardPlan& plan) : tile_unit(plan.parts.factors > 0), memory(carve(plan, nullptr)) {
    carve(plan, memory.get());
  }

  // The normaliser before chunk `index` of the segment.
  Normalizer chunk_start(int64_t index) const {
    return {chunk_shifts + index * chunk.stride, chunk_sums + index * chunk.stride};
  }
  Normalizer segment_start(int64_t index) const {
    return {segment_shifts + index * chunk.stride, segment_sums + index * chunk.stride};
  }
};

// The state that the head starts from, transposed, in the unit of its own normaliser; nothing for later segments.
[[maybe_unused]] static void start_transposed_state(const Head& head, bool is_first, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const int64_t stride = scratch.chunk.stride;
  scratch.normalizer.start(is_first ? head.initial_log_normalizer() : nullptr, problem.key_width);
  zero(scratch.transposed_state, scratch.value_stride * stride);
  for (int64_t d = 0; is_first && d < problem.key_width; ++d) {
    const float* source = head.memory_row(problem.initial_memory, d);
    if (source == nullptr || scratch.normalizer.sum[d] == 0.0) continue;
    for (int64_t c = 0; c < problem.value_width; ++c) scratch.transposed_state[c * stride + d] = source[c];
  }
}

// The next chunk in order: the state in its unit, its keys as they are. The normaliser is that before the chunk.
[[maybe_unused]] static void open_chunk(const Head& head, int64_t first, int64_t end, BackwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  load_keys(head.problem, head.sequence.batch, head.key_head, first,
            static_cast<int>(core::smaller(kChunkRows, end - first)), chunk);
  if (!lift_and_cut(chunk, scratch.normalizer)) return;
  for (int64_t c = 0; c < scratch.value_stride; ++c)
    for (int64_t d = 0; d < chunk.stride; d += Vec::kWidth) {
      float* entry = scratch.transposed_state + c * chunk.stride + d;
      const Vec factor = Vec::load(chunk.factors + d);
      // A factor of 0 forgets what was, NaN included.
      store(entry, select(equal(factor, Vec::broadcast(0.0f)), factor, Vec::load(entry) * factor));
    }
}

// The chunk's values. Whether all of them are finite.
[[maybe_unused]] static bool load_values(const Head& head, int64_t first, int rows, BackwardScratch& scratch) {
  load_rows(head.problem.value, head.problem.dtype, head.sequence.batch, head.key_head, first, 0, rows,
            head.problem.value_width, scratch.values, scratch.value_stride);
  // Of a masked key not even a NaN may stay: a product of zeros with it would not be zero.
  for (int row = 0; row < rows; ++row)
    if (!scratch.chunk.takes_part[row]) zero(scratch.values + row * scratch.value_stride, scratch.value_stride);
  return is_finite(scratch.values, rows * scratch.value_stride);
}

[[maybe_unused]] static bool load_grad_outputs(const Head& head, int64_t query_head, int64_t first, int rows,
                                               BackwardScratch& scratch) {
  load_rows(head.gradients.grad_output, head.problem.dtype, head.sequence.batch, query_head, first, 0, rows,
            head.problem.value_width, scratch.grad_outputs, scratch.value_stride);
  return is_finite(scratch.grad_outputs, rows * scratch.value_stride);
}

// Queries times the scale and `factors`, one row for all (stride 0) or one for each.
[[maybe_unused]] static bool load_scaled_queries(const Head& head, int64_t query_head, int64_t first, int rows,
                                                 const float* factors, int64_t factor_stride,
                                                 BackwardScratch& scratch) {
  load_scaled_queries(head.problem, head.sequence.batch, query_head, first, rows, factors, factor_stride,
                      scratch.queries);
  return is_finite(scratch.queries, rows * scratch.chunk.stride);
}

// G transposed, as G v is multiplied.
[[maybe_unused]] static void transpose_gradient(BackwardScratch& scratch) {
  transpose(scratch.state_gradient, scratch.value_stride, scratch.transposed_gradient, scratch.chunk.stride,
            scratch.chunk.stride, scratch.value_stride);
}

// dv and G v of the rows from what comes after the chunk, in the scratch.
[[maybe_unused]] static void receive_from_later_rows(const Head& head, BackwardScratch& scratch, Prefetches next = {}) {
  const KeyChunk& chunk = scratch.chunk;
  next.products = 2;
  product<false>({chunk.gained, chunk.stride, 1}, scratch.state_gradient, scratch.value_stride, scratch.grad_values,
                 scratch.value_stride, chunk.rows, scratch.value_stride, head.problem.key_width, AskFor{next});
  product<false>({scratch.values, scratch.value_stride, 1}, scratch.transposed_gradient, chunk.stride, scratch.received,
                 chunk.stride, chunk.rows, chunk.stride, head.problem.value_width, AskFor{next});
}

// The chunk joins these channels of the transposed state.
[[maybe_unused]] static void add_chunk_to_transposed_state(const Head& head, bool finite, Channels channels,
                                                           BackwardScratch& scratch, Prefetches next = {}) {
  const KeyChunk& chunk = scratch.chunk;
  accumulate_product(finite && is_finite(chunk.gained, chunk.rows * chunk.stride),
                     {scratch.values, 1, scratch.value_stride}, chunk.gained + channels.begin, chunk.stride,
                     scratch.transposed_state + channels.begin, chunk.stride, head.problem.value_width,
                     channels.end - channels.begin, chunk.rows, AskFor{next});
}

// <G, S> of a vector of channels from `d` on. The sum is taken in the order of the product G v, so that a single key
// has no gradient; where a gain has rounded what is summed, order brings nothing and only precision does.
[[maybe_unused]] static void response_to_state(const BackwardScratch& scratch, int64_t d, int64_t value_width,
                                               double (&response)[Vec::kWidth]) {
  const int64_t stride = scratch.chunk.stride;
  const float *state = scratch.transposed_state + d, *gradient = scratch.transposed_gradient + d;
  if (scratch.chunk.has_gain) {
    for (double& lane : response) lane = 0.0;
    for (int64_t c = 0; c < value_width; ++c)
      for (int lane = 0; lane < Vec::kWidth; ++lane)
        response[lane] += static_cast<double>(state[c * stride + lane]) * gradient[c * stride + lane];
    return;
  }
  Vec inner = Vec::broadcast(0.0f);
  for (int64_t begin = 0; begin < value_width; begin += kDepthChunk) {
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t c = begin; c < core::smaller(begin + kDepthChunk, value_width); ++c)
      sum = fma(Vec::load(state + c * stride), Vec::load(gradient + c * stride), sum);
    inner = inner + sum;
  }
  alignas(64) float lanes[Vec::kWidth];
  store(lanes, inner);
  for (int lane = 0; lane < Vec::kWidth; ++lane) response[lane] = static_cast<double>(lanes[lane]);
}

// r = the gradient of the log normaliser - <G, S> with G as it is; in the unit of the last normaliser.
[[maybe_unused]] static void set_response_to_state(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const int64_t stride = scratch.chunk.stride;
  const float* given = head.gradients.grad_log_normalizer;
  transpose_gradient(scratch);
  for (int64_t d = 0; d < stride; d += Vec::kWidth) {
    double response[Vec::kWidth];
    response_to_state(scratch, d, problem.value_width, response);
    for (int64_t lane = d; lane < d + Vec::kWidth && lane < problem.key_width; ++lane) {
      const double sum = scratch.normalizer.sum[lane];
      const double wanted = given == nullptr ? 0.0 : given[head.state_row(lane)];
      if (sum != 0.0) scratch.key_response[lane] = (wanted - response[lane - d]) / sum;
    }
  }
}

// G and r after the last row: the gradients of the final state on top of `state_gradient`, in the unit of the last
// normaliser.
[[maybe_unused]] static void start_gradient(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  for (int64_t d = 0; d < scratch.chunk.stride; ++d) {
    scratch.gradient_shift[d] = scratch.normalizer.shift[d];
    scratch.key_response[d] = 0.0;
    const double sum = scratch.normalizer.sum[d];
    if (d >= problem.key_width || sum == 0.0) continue;
    const float* memory = head.memory_row(gradients.grad_memory, d);
    if (memory == nullptr) continue;
    for (int64_t c = 0; c < problem.value_width; ++c)
      scratch.state_gradient[d * scratch.value_stride + c] += static_cast<float>(memory[c] / sum);
  }
  set_response_to_state(head, scratch);
}

// G and r before the first row are what the initial state receives.
[[maybe_unused]] static void write_initial_gradients(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  if (gradients.grad_initial_memory == nullptr) return;
  for (int64_t d = 0; d < problem.key_width; ++d) {
    const float before = problem.initial_log_normalizer[head.state_row(d)];
    const float factor = before == -INFINITY ? 0.0f : change_of_unit(before, scratch.gradient_shift[d]);
    const float* row = scratch.state_gradient + d * scratch.value_stride;
    const float* memory = head.memory_row(problem.initial_memory, d);
    float* target = gradients.grad_initial_memory + head.state_row(d) * problem.value_width;
    double inner = 0.0;
    for (int64_t c = 0; c < problem.value_width; ++c) {
      target[c] = factor == 0.0f ? 0.0f : row[c] * factor;
      inner += static_cast<double>(memory[c]) * target[c];
    }
    gradients.grad_initial_log_normalizer[head.state_row(d)] =
        factor == 0.0f ? 0.0f : static_cast<float>(inner + scratch.key_response[d] * factor);
  }
}

// dv, dx and dgain of the chunk's rows from dv, from G_t v_t = `received` + `received_within`, and from r_t = r after
// the chunk + what its own rows add. dx pairs the two that come from later rows and the two from the chunk's own before
// it adds them: where one key holds all the weight each pair cancels, and their sums would not cancel as well.
// `query_responses` is null where every row has the same r and nothing within the chunk.
[[maybe_unused]] static void write_key_gradients(const Head& head, const float* query_responses,
                                                 BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  const KeyChunk& chunk = scratch.chunk;
  const int64_t batch = head.sequence.batch, stride = chunk.stride;
  const bool wants_gain = gradients.grad_gain.data != nullptr;
  for (int64_t d = 0; d < stride; d += Vec::kWidth) {
    alignas(64) float lanes[Vec::kWidth];
    for (int lane = 0; lane < Vec::kWidth; ++lane) lanes[lane] = static_cast<float>(scratch.key_response[d + lane]);
    const Vec later = Vec::load(lanes), nothing = Vec::broadcast(0.0f);
    Vec own = nothing;
    for (int row = chunk.rows - 1; row >= 0; --row) {
      const int64_t entry = row * stride + d;
      if (query_responses != nullptr) own = own + Vec::load(query_responses + entry);
      const Vec weight = Vec::load(chunk.weights + entry), gained = Vec::load(chunk.gained + entry);
      const Vec received = Vec::load(scratch.received + entry);
      const Vec within = query_responses != nullptr ? Vec::load(scratch.received_within + entry) : nothing;
      const Vec from_later = fma(gained, received, weight * later);
      store(scratch.queries + entry, from_later + (gained * within - weight * own));
      if (wants_gain) store(scratch.received + entry, weight * (received + within));
    }
    store(lanes, own);
    for (int lane = 0; lane < Vec::kWidth; ++lane) scratch.key_response[d + lane] -= static_cast<double>(lanes[lane]);
  }
  for (int row = 0; row < chunk.rows; ++row) {
    float* received = scratch.received + row * stride;
    float* grad_values = scratch.grad_values + row * scratch.value_stride;
    float* grad_keys = scratch.queries + row * stride;
    if (!chunk.takes_part[row]) {
      if (wants_gain) zero(received, stride);
      zero(grad_values, scratch.value_stride);
      zero(grad_keys, stride);
    }
    if (wants_gain)
      narrow(received,
             writable_row_of(gradients.grad_gain, problem.gain_dtype, batch, head.key_head, chunk.first + row),
             problem.gain_dtype, problem.key_width);
  }
  head.grad_keys().write(scratch.queries, stride, batch, head.key_head, chunk.first, chunk.rows);
  head.grad_values().write(scratch.grad_values, scratch.value_stride, batch, head.key_head, chunk.first, chunk.rows);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
