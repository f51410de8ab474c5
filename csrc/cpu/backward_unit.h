// What the backward pass works with: its plan, a thread's scratch memory, and loading keys and the gradients of rows.
#pragma once

#include "cpu/backward_pairs.h"
#include "cpu/differentiate_tile.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct AttentionBackwardPlan {
  const AttentionProblem* problem;
  const AttentionGradients* gradients;
  int64_t splits;
  int64_t rows;       // of one key head: G * M
  int64_t key_width;  // D padded to vectors
  int64_t padded_value_width;
  int64_t key_tiles;
  int64_t tiles_per_split;
  int64_t tiles_together;  // of rows
  float* partial_queries;  // (splits, B * Hk, rows, D) or null when there is one split
  double* partial_scales;  // (splits, B, H) or null
  double* partial_sinks;   // (B, H) or null
  int parts;               // of products of pairs, for row tiles that are finite; 0: products of fp32
  bool in_one_pass;        // from products of pairs to rounded score gradients
};

// Row tiles that go through the keys together, a power of two: chunks of kGradientRows are whole numbers of them.
[[maybe_unused]] static int64_t rows_together(const AttentionBackwardPlan& plan) {
  const int64_t widths = 3 * plan.key_width + 2 * plan.padded_value_width;
  const int64_t tile_bytes = kRowTile * widths * static_cast<int64_t>(sizeof(float));
  int64_t tiles = 1;
  while (2 * tiles <= kMostRowTilesTogether && 2 * tiles * tile_bytes <= kRowTilesBytes && tiles * kRowTile < plan.rows)
    tiles *= 2;
  return tiles;
}

// A tile of rows that is under way.
struct BackwardRows {
  RowTile* rows;
  RowGradients* row_gradients;
  float *queries, *transposed_queries, *output_gradients, *transposed_output_gradients, *query_gradients;
  PairOperands pairs;
  bool finite;    // with the keys of the unit; false: products must skip zero weights
  bool in_pairs;  // goes through products of pairs
};

struct AttentionBackwardScratch {
  explicit AttentionBackwardScratch(const AttentionBackwardPlan& plan)
      : tile_unit(plan.parts > 0), memory(layout(plan, nullptr)) {
    layout(plan, memory.get());
  }

  int64_t layout(const AttentionBackwardPlan& plan, char* base) {
    const AttentionProblem& problem = *plan.problem;
    Arena arena(base);
    const int64_t split_keys = plan.tiles_per_split * kKeyTile;
    row_values = arena.take<float>(kRowTile * plan.padded_value_width);
    transposed_row_values = arena.take<float>(kRowTile * problem.value_width);
    row = arena.take<float>(core::larger(plan.key_width, plan.padded_value_width));
    scores = arena.take<float>(kRowTile * kKeyTile);
    score_gradients = arena.take<float>(kRowTile * kKeyTile);
    bias = arena.take<float>(problem.attn_mask.kind != MaskKind::kNone ? kRowTile * kKeyTile : 0);
    keys = arena.take<float>(split_keys * plan.key_width);
    values = arena.take<float>(split_keys * plan.padded_value_width);
    key_gradients = arena.take<float>(split_keys * plan.key_width);
    value_gradients = arena.take<float>(split_keys * plan.padded_value_width);
    const int64_t total_keys = plan.rows > kGradientRows ? split_keys : 0;
    key_totals = arena.take<float>(total_keys * plan.key_width);
    value_totals = arena.take<float>(total_keys * plan.padded_value_width);
    key_tiles = arena.take<KeyTile>(plan.tiles_per_split);
    PairOperands pairs{};
    if (plan.parts > 0) pairs.carve(arena, problem, split_keys, plan.parts);
    row_tiles = arena.take<BackwardRows>(plan.tiles_together);
    for (int64_t tile = 0; tile < plan.tiles_together; ++tile) {
      BackwardRows at{};
      at.rows = arena.take<RowTile>(1);
      at.row_gradients = arena.take<RowGradients>(1);
      at.queries = arena.take<float>(kRowTile * plan.key_width);
      at.transposed_queries = arena.take<float>(kRowTile * problem.head_width);
      at.output_gradients = arena.take<float>(kRowTile * plan.padded_value_width);
      at.transposed_output_gradients = arena.take<float>(kRowTile * problem.value_width);
      at.query_gradients = arena.take<float>(kRowTile * plan.key_width);
      at.pairs = pairs;
      if (plan.parts > 0) at.pairs.carve_rows(arena);
      if (base != nullptr) row_tiles[tile] = at;
    }
    return arena.used();
  }

  TileUnit tile_unit;
  Allocation memory;
  float *row_values = nullptr, *transposed_row_values = nullptr, *row = nullptr, *scores = nullptr;
  float *score_gradients = nullptr, *bias = nullptr, *keys = nullptr, *values = nullptr, *key_gradients = nullptr;
  float *value_gradients = nullptr, *key_totals = nullptr, *value_totals = nullptr;
  KeyTile* key_tiles = nullptr;
  BackwardRows* row_tiles = nullptr;
  bool finite = true, finite_values = true;  // all keys, all values of the unit
};

// Widens the split's keys and values, tile after tile, with the factors of the keys, and clears their gradients.
template <int kParts>
static void load_keys(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, int64_t batch,
                      int64_t key_head, int64_t split) {
  const AttentionProblem& problem = *plan.problem;
  int64_t local = 0;
  for (int64_t tile = split; tile < plan.key_tiles; tile += plan.splits, local += kKeyTile) {
    const int64_t first = tile * kKeyTile;
    const int64_t count = core::smaller(kKeyTile, problem.keys - first);
    for (int64_t j = 0; j < count; ++j) {
      float* key = scratch.keys + (local + j) * plan.key_width;
      float* value = scratch.values + (local + j) * plan.padded_value_width;
      widen(row_of(problem.key, problem.dtype, batch, key_head, first + j), problem.dtype, key, problem.head_width);
      zero(key + problem.head_width, plan.key_width - problem.head_width);
      widen(row_of(problem.value, problem.dtype, batch, key_head, first + j), problem.dtype, value,
            problem.value_width);
      zero(value + problem.value_width, plan.padded_value_width - problem.value_width);
      scratch.finite &= is_finite(key, problem.head_width);
      scratch.finite_values &= is_finite(value, problem.value_width);
    }
    KeyTile& keys = scratch.key_tiles[local / kKeyTile];
    keys.first = first;
    keys.count = static_cast<int>(count);
    keys.keys = scratch.keys + local * plan.key_width;
    keys.key_stride = plan.key_width;
    keys.values = scratch.values + local * plan.padded_value_width;
    keys.value_stride = plan.padded_value_width;
    set_up_key_factors(problem, batch, keys);
    if constexpr (kParts > 0)
      load_pair_keys<kParts>(problem, batch, key_head, first, local / kKeyTile, scratch.keys + local * plan.key_width,
                             scratch.values + local * plan.padded_value_width, scratch.row_tiles->pairs);
  }
  const int64_t split_keys = plan.tiles_per_split * kKeyTile;
  zero(scratch.key_gradients, split_keys * plan.key_width);
  zero(scratch.value_gradients, split_keys * plan.padded_value_width);
  if (scratch.key_totals == nullptr) return;
  zero(scratch.key_totals, split_keys * plan.key_width);
  zero(scratch.value_totals, split_keys * plan.padded_value_width);
}

[[maybe_unused]] static void move_sums(float* sums, float* totals, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    totals[index] += sums[index];
    sums[index] = 0.0f;
  }
}

// Ends a chunk of rows: what it gathered for keys and values goes to the totals.
[[maybe_unused]] static void finish_chunk(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch) {
  const int64_t keys = plan.tiles_per_split * kKeyTile;
  move_sums(scratch.key_gradients, scratch.key_totals, keys * plan.key_width);
  move_sums(scratch.value_gradients, scratch.value_totals, keys * plan.padded_value_width);
}

// <dO, x> of the row tile's rows x in scratch.row_values.
[[maybe_unused]] static void multiply_with_gradients(const AttentionBackwardPlan& plan,
                                                     const AttentionBackwardScratch& scratch, const BackwardRows& at,
                                                     float* products) {
  const int64_t width = plan.problem->value_width, lanes = at.rows->lanes;
  transpose_rows(scratch.row_values, plan.padded_value_width, lanes, width, scratch.transposed_row_values);
  dots_in_order(at.transposed_output_gradients, scratch.transposed_row_values, width, lanes, products);
}

// Output gradients of the row tile in both layouts, and what the saved tensors say of its rows. Whether the tile can go
// through products of pairs.
[[maybe_unused]] static bool load_row_gradients(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch,
                                                BackwardRows& at) {
  const AttentionProblem& problem = *plan.problem;
  const AttentionGradients& gradients = *plan.gradients;
  const RowTile& rows = *at.rows;
  RowGradients& state = *at.row_gradients;
  state = RowGradients{};  // lanes past the last row: all zero
  const int64_t width = problem.value_width, stride = plan.padded_value_width;
  zero(at.output_gradients, rows.lanes * stride);
  zero(scratch.row_values, rows.lanes * stride);
  for (int lane = 0; lane < rows.rows; ++lane) {
    float* gradient = at.output_gradients + lane * stride;
    const int64_t head = rows.head[lane], query = rows.query[lane];
    widen(row_of(gradients.grad_output, problem.dtype, rows.batch, head, query), problem.dtype, gradient, width);
    widen(row_of(problem.output, problem.dtype, rows.batch, head, query), problem.dtype,
          scratch.row_values + lane * stride, width);
    at.finite &= is_finite(gradient, width) && is_finite(at.queries + lane * plan.key_width, problem.head_width);
  }
  transpose_rows(at.output_gradients, stride, rows.lanes, width, at.transposed_output_gradients);
  multiply_with_gradients(plan, scratch, at, state.delta);
  const auto row_index = [&](int lane) {
    return (rows.batch * problem.heads + rows.head[lane]) * problem.queries + rows.query[lane];
  };
  alignas(64) float response_products[kRowTile] = {};
  if (problem.reweight.power > 0.0f) {
    for (int lane = 0; lane < rows.rows; ++lane)
      __builtin_memcpy(scratch.row_values + lane * stride, problem.saved_values + row_index(lane) * width,
                       static_cast<size_t>(width) * sizeof(float));
    multiply_with_gradients(plan, scratch, at, response_products);
  }
  bool pairs = scratch.finite_values;
  for (int lane = 0; lane < rows.rows; ++lane) {
    const float log_gradient =
        gradients.grad_log_normalizer == nullptr ? 0.0f : gradients.grad_log_normalizer[row_index(lane)];
    set_row_gradient(problem, rows, lane, response_products[lane], log_gradient, state);
    pairs &= is_finite(state, lane);
  }
  return pairs && at.finite;
}

// The operands of products of pairs of the row tile.
template <int kParts>
static void load_pair_rows(const AttentionProblem& problem, AttentionBackwardScratch& scratch, BackwardRows& at) {
  load_pair_rows<kParts>(problem, *at.rows, at.queries, at.transposed_queries, at.output_gradients,
                         at.transposed_output_gradients, at.pairs);
  multiply_with_outputs<kParts>(problem, *at.rows, at.pairs, scratch.row, at.row_gradients->delta);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
