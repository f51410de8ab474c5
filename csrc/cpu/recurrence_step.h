// The additive recurrence on a sequence of one row, as in decoding: one pass over the state (MATH.md section 4).
//
// The state is read, updated, used and written once, a few vectors of columns at a time with the outputs of up to four
// query heads in registers, so that the time is that of its memory.
#pragma once

#include "cpu/recurrence_chunk.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct StepScratch {
  Allocation memory;
  int64_t key_stride, value_stride;
  float* keys;     // the key, then its weight times the gain
  float* decays;   // what remains of the state, per channel
  float* queries;  // (kStepHeads, padded Dk), scaled; 0 in channels that have met no key
  float* values;
  float* outputs;         // (kStepHeads, padded Dv)
  float* log_normalizer;  // before, then after the row

  int64_t carve(const RecurrenceProblem& problem, char* start) {
    Arena arena(start);
    key_stride = padded(problem.key_width);
    value_stride = padded(problem.value_width);
    keys = arena.take<float>(key_stride);
    decays = arena.take<float>(key_stride);
    queries = arena.take<float>(kStepHeads * key_stride);
    values = arena.take<float>(value_stride);
    outputs = arena.take<float>(kStepHeads * value_stride);
    log_normalizer = arena.take<float>(key_stride);
    return arena.used();
  }
  explicit StepScratch(const RecurrenceProblem& problem) : memory(carve(problem, nullptr)) {
    carve(problem, memory.get());
  }
};

// Decay and weight of every channel, and the new normaliser. Whether the key takes part.
[[maybe_unused]] static bool weigh_step(const RecurrenceProblem& problem, int64_t batch, int64_t key_head,
                                        StepScratch& scratch) {
  const bool live = problem.key_mask == nullptr || problem.key_mask[batch * problem.key_mask_strides[0]] != 0;
  const int64_t width = problem.key_width;
  if (live) widen(row_of(problem.key, problem.dtype, batch, key_head, 0), problem.dtype, scratch.keys, width);
  for (int64_t d = live ? width : 0; d < scratch.key_stride; ++d) scratch.keys[d] = -INFINITY;
  const float* before = problem.initial_log_normalizer;
  for (int64_t d = 0; d < scratch.key_stride; ++d)
    scratch.log_normalizer[d] =
        before != nullptr && d < width ? before[(batch * problem.key_heads + key_head) * width + d] : -INFINITY;

  const Vec nothing = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f), log2e = Vec::broadcast(core::kLog2E);
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  for (int64_t d = 0; d < scratch.key_stride; d += Vec::kWidth) {
    const Vec z = Vec::load(scratch.log_normalizer + d), key = Vec::load(scratch.keys + d);
    const Vec largest = maximum(z, key);  // the key where that is NaN
    // Neither has met a key; a state that is NaN has, and stays so.
    const Mask dead = equal(select(equal(z, minus_infinity), key, nothing), minus_infinity);
    const Vec shift = select(dead, nothing, largest);
    const Vec past = core::exp2((z - shift) * log2e), present = core::exp2((key - shift) * log2e);
    // One of the two is 1, so that their product is the other, and NaN of either stays. Their sum would keep no more
    // than 2^-23 of the other: where each of thousands of tokens is a small part of what has been, what is lost of them
    // adds up.
    const Vec other = past * present;
    const Vec minor = other / (one + other), major = one - minor;
    const Vec log_total = core::log2_one_plus(other) * Vec::broadcast(core::kLn2);
    const Mask climbs = less(past, present);
    store(scratch.decays + d, select(dead, nothing, select(climbs, minor, major)));
    store(scratch.keys + d, select(dead, nothing, select(climbs, major, minor)));
    store(scratch.log_normalizer + d, select(dead, minus_infinity, shift + log_total));
  }
  return live;
}

// Columns [column, column + kVectors vectors) of the state: S = decay S + key v^T, outputs = queries S. A decay of 0
// forgets the state, NaN included, and a weight of 0 takes nothing of a value that is not finite.
template <int kHeads, int kVectors, bool kFinite, bool kPastCaches>
static void step_columns(const StepScratch& scratch, int64_t channels, int64_t column, const float* before,
                         float* after, int64_t stride) {
  Vec values[kVectors], outputs[kHeads][kVectors];
  SIGHTLINE_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) {
    values[vector] = Vec::load(scratch.values + column + vector * Vec::kWidth);
    SIGHTLINE_UNROLL
    for (int head = 0; head < kHeads; ++head) outputs[head][vector] = Vec::broadcast(0.0f);
  }
  for (int64_t d = 0; d < channels; ++d) {
    const Vec decay = Vec::broadcast(scratch.decays[d]), weight = Vec::broadcast(scratch.keys[d]);
    const bool keeps = before != nullptr && scratch.decays[d] != 0.0f;
    const bool takes = kFinite || scratch.keys[d] != 0.0f;
    if (!kPastCaches && after != nullptr && d + kStepRowsAhead < channels)
      for (int vector = 0; vector < kVectors; ++vector)
        __builtin_prefetch(after + (d + kStepRowsAhead) * stride + vector * Vec::kWidth, 1, 3);
    SIGHTLINE_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) {
      Vec state = Vec::broadcast(0.0f);
      if (keeps) state = Vec::load(before + d * stride + vector * Vec::kWidth) * decay;
      if (takes) state = fma(weight, values[vector], state);
      if (kPastCaches)
        stream(after + d * stride + vector * Vec::kWidth, state);
      else if (after != nullptr)
        store(after + d * stride + vector * Vec::kWidth, state);
      SIGHTLINE_UNROLL
      for (int head = 0; head < kHeads; ++head)
        outputs[head][vector] =
            fma(Vec::broadcast(scratch.queries[head * scratch.key_stride + d]), state, outputs[head][vector]);
    }
  }
  SIGHTLINE_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) SIGHTLINE_UNROLL
  for (int head = 0; head < kHeads; ++head)
    store(scratch.outputs + head * scratch.value_stride + column + vector * Vec::kWidth, outputs[head][vector]);
}

// The columns past the last whole vector, one at a time.
template <int kHeads>
static void step_last_columns(const StepScratch& scratch, int64_t channels, int64_t column, int64_t columns,
                              const float* before, float* after, int64_t stride) {
  for (int64_t lane = 0; lane < columns; ++lane) {
    float outputs[kHeads] = {};
    for (int64_t d = 0; d < channels; ++d) {
      const bool keeps = before != nullptr && scratch.decays[d] != 0.0f;
      float state = keeps ? before[d * stride + lane] * scratch.decays[d] : 0.0f;
      if (scratch.keys[d] != 0.0f) state += scratch.keys[d] * scratch.values[column + lane];
      if (after != nullptr) after[d * stride + lane] = state;
      for (int head = 0; head < kHeads; ++head) outputs[head] += scratch.queries[head * scratch.key_stride + d] * state;
    }
    for (int head = 0; head < kHeads; ++head)
      scratch.outputs[head * scratch.value_stride + column + lane] = outputs[head];
  }
}

template <int kHeads, bool kFinite, bool kPastCaches>
static void step_state(const RecurrenceProblem& problem, const float* before, float* after,
                       const StepScratch& scratch) {
  const int64_t width = problem.value_width;
  const auto at = [](auto* state, int64_t column) { return state == nullptr ? nullptr : state + column; };
  constexpr int kVectors = kHeads == 1 ? 2 * kStepVectors : kStepVectors;
  int64_t column = 0;
  for (; column + kVectors * Vec::kWidth <= width; column += kVectors * Vec::kWidth)
    step_columns<kHeads, kVectors, kFinite, kPastCaches>(scratch, problem.key_width, column, at(before, column),
                                                         at(after, column), width);
  for (; column + Vec::kWidth <= width; column += Vec::kWidth)
    step_columns<kHeads, 1, kFinite, kPastCaches>(scratch, problem.key_width, column, at(before, column),
                                                  at(after, column), width);
  step_last_columns<kHeads>(scratch, problem.key_width, column, width - column, at(before, column), at(after, column),
                            width);
}

[[maybe_unused]] static void load_step_query(const RecurrenceProblem& problem, int64_t batch, int64_t head,
                                             float* query, StepScratch& scratch) {
  widen(row_of(problem.query, problem.dtype, batch, head, 0), problem.dtype, query, problem.key_width);
  for (int64_t d = 0; d < problem.key_width; ++d)
    query[d] = scratch.log_normalizer[d] == -INFINITY ? 0.0f : query[d] * problem.scale;
}

// Whether new states go past the caches, as other results do (result_rows.h).
SIGHTLINE_INLINE bool streams_states(const RecurrenceProblem& problem, const float* after) {
  const int64_t row_bytes = problem.value_width * static_cast<int64_t>(sizeof(float));
  return kHasStreams && after != nullptr && reinterpret_cast<uintptr_t>(after) % kLineBytes == 0 &&
         row_bytes % kLineBytes == 0 &&
         problem.batch * problem.key_heads * problem.key_width * row_bytes >= kStreamedBytes;
}

template <int kHeads>
static void step_heads(const RecurrenceProblem& problem, int64_t batch, int64_t head, bool finite, const float* before,
                       float* after, StepScratch& scratch) {
  for (int index = 0; index < kHeads; ++index)
    load_step_query(problem, batch, head + index, scratch.queries + index * scratch.key_stride, scratch);
  if (!finite)
    step_state<kHeads, false, false>(problem, before, after, scratch);
  else if (streams_states(problem, after))
    step_state<kHeads, true, true>(problem, before, after, scratch);
  else
    step_state<kHeads, true, false>(problem, before, after, scratch);
  for (int index = 0; index < kHeads; ++index)
    narrow(scratch.outputs + index * scratch.value_stride,
           writable_row_of(problem.output, problem.dtype, batch, head + index, 0), problem.dtype, problem.value_width);
}

// One key head of one batch entry.
[[maybe_unused]] static void run_step(const RecurrenceProblem& problem, int64_t batch, int64_t key_head,
                                      StepScratch& scratch) {
  const int64_t group = problem.heads / problem.key_heads, width = problem.key_width;
  const int64_t state_row = (batch * problem.key_heads + key_head) * width;
  const bool live = weigh_step(problem, batch, key_head, scratch);
  if (live)
    widen(row_of(problem.value, problem.dtype, batch, key_head, 0), problem.dtype, scratch.values, problem.value_width);
  else
    zero(scratch.values, scratch.value_stride);
  if (live && problem.key_gain.data != nullptr) {
    widen(row_of(problem.key_gain, problem.gain_dtype, batch, key_head, 0), problem.gain_dtype, scratch.queries, width);
    for (int64_t d = 0; d < width; ++d) scratch.keys[d] *= scratch.queries[d];
  }
  const bool finite = is_finite(scratch.values, problem.value_width);
  const float* before =
      problem.initial_memory == nullptr ? nullptr : problem.initial_memory + state_row * problem.value_width;
  float* after = problem.final_memory == nullptr ? nullptr : problem.final_memory + state_row * problem.value_width;
  int64_t head = 0;
  for (; head + kStepHeads <= group; head += kStepHeads, after = nullptr)  // the first heads write the state for all
    step_heads<kStepHeads>(problem, batch, key_head * group + head, finite, before, after, scratch);
  for (; head < group; ++head, after = nullptr)
    step_heads<1>(problem, batch, key_head * group + head, finite, before, after, scratch);
  if (problem.final_log_normalizer != nullptr)
    for (int64_t d = 0; d < width; ++d) problem.final_log_normalizer[state_row + d] = scratch.log_normalizer[d];
}

}  // namespace sightline::SIGHTLINE_ISA_NS
