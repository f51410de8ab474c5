// What the forward pass works with: how rows are cut into units, a thread's scratch memory, the start and end of what
// rows gather, and loading a tile of keys.
#pragma once

#include "cpu/weigh_pairs.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

// More rows per unit read K and V less often, and load or transpose them less often where they are not used as they
// lie; a unit's state should stay in a second-level cache, and there should be units enough for all threads to end
// together.
constexpr int64_t kMaxTilesPerUnit = 8;
constexpr int64_t kUnitStateBytes = 512 * 1024;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kKeptBytes = 2048 * 1024;
constexpr int64_t kChunkKeys = 2048;

// How the query rows of a key head are cut into units.
struct AttentionForwardPlan {
  const AttentionProblem* problem;
  int64_t rows;       // G * M
  int64_t unit_rows;  // at most kMaxTilesPerUnit tiles
  int64_t units;      // per key head
  bool pairs;         // products of pairs, for units that are finite
  bool keeps;         // weights from one sweep to the next, for units in which they fit

  AttentionForwardPlan(const AttentionProblem& of, int64_t threads)
      : problem(&of), rows(of.heads / of.key_heads * of.queries) {
    pairs = kHasPairProducts && of.dtype == DType::kBFloat16 && !of.dropout;
    const int64_t tile_bytes = kRowTile * static_cast<int64_t>(sizeof(float)) * (of.head_width + 2 * of.value_width);
    int64_t tiles = core::smaller(kMaxTilesPerUnit, core::larger(1, kUnitStateBytes / tile_bytes));
    const int64_t all_tiles = (rows + kRowTile - 1) / kRowTile * of.batch * of.key_heads;
    tiles = core::smaller(tiles, core::larger(1, all_tiles / (kUnitsPerThread * threads)));
    keeps = of.reweight.power > 0.0f && of.weight_function == WeightFunction::kSoftplus;
    const int64_t kept_tiles = kKeptBytes / core::larger(kept_bytes(of.keys), 1);
    if (keeps && kept_tiles > 0) tiles = core::smaller(tiles, kept_tiles);
    unit_rows = kRowTile * tiles;
    units = (rows + unit_rows - 1) / unit_rows;
  }

  // Of a tile of rows against this many keys.
  static int64_t kept_bytes(int64_t keys) {
    return core::round_up(keys, kKeyTile) * kRowTile * static_cast<int64_t>(sizeof(float));
  }
};

struct AttentionForwardScratch {
  explicit AttentionForwardScratch(const AttentionForwardPlan& plan)
      : tile_unit(plan.pairs), memory(layout(plan, nullptr)) {
    layout(plan, memory.get());
  }

  int64_t layout(const AttentionForwardPlan& plan, char* base) {
    const AttentionProblem& problem = *plan.problem;
    // One-row decoding must not pay for clearing and mapping the memory of full tiles.
    const int64_t tile_rows = core::smaller(kRowTile, core::round_up(plan.rows, Vec::kWidth));
    const int64_t tiles = core::smaller(plan.unit_rows, core::round_up(plan.rows, kRowTile)) / kRowTile;
    Arena arena(base);
    padded_width = core::round_up(problem.value_width, Vec::kWidth);
    const bool saves_response = problem.saved_values != nullptr;
    states = arena.take<RowState>(tiles);
    queries = arena.take<float>(tile_rows * problem.head_width);
    scores = arena.take<float>(tile_rows * kKeyTile);
    responses = arena.take<float>(saves_response ? tile_rows * kKeyTile : 0);
    kept = arena.take<float>(plan.keeps
                                 ? core::smaller(kKeptBytes, tiles * AttentionForwardPlan::kept_bytes(problem.keys)) /
                                       static_cast<int64_t>(sizeof(float))
                                 : 0);
    tile_largest = arena.take<float>(
        problem.reweight.power > 0.0f ? tiles * core::round_up(problem.keys, kKeyTile) / kKeyTile * kRowTile : 0);
    bias = arena.take<float>(problem.attn_mask.kind != MaskKind::kNone ? tile_rows * kKeyTile : 0);
    keys = arena.take<float>(kKeyTile * problem.head_width);
    values = arena.take<float>(kKeyTile * padded_width);
    padded_depth = core::round_up(problem.head_width, kPairDepth);
    weight_pairs = arena.take<uint32_t>(plan.pairs ? tile_rows * kKeyTile / 2 : 0);
    response_pairs = arena.take<uint32_t>(plan.pairs && saves_response ? tile_rows * kKeyTile / 2 : 0);
    key_bits = arena.take<uint16_t>(plan.pairs ? kKeyTile * padded_depth : 0);
    value_columns = arena.take<uint16_t>(plan.pairs ? padded_width * kKeyTile : 0);
    const int64_t tile_values = tile_rows * padded_width;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* transposed = arena.take<float>(tile_rows * problem.head_width);
      uint32_t* query_pairs = arena.take<uint32_t>(plan.pairs ? tile_rows * padded_depth / 2 : 0);
      float* sums[4];
      for (int which = 0; which < 4; ++which)
        sums[which] = arena.take<float>(which < 2 || saves_response ? tile_values : 0);
      if (base == nullptr) continue;
      RowState& state = states[tile];
      state.transposed_queries = transposed;
      state.query_pairs = query_pairs;
      state.values = sums[0];
      state.chunk_values = sums[1];
      state.response_values = sums[2];
      state.chunk_response_values = sums[3];
    }
    return arena.used();
  }

  TileUnit tile_unit;
  Allocation memory;
  int64_t padded_width = 0, padded_depth = 0;
  RowState* states = nullptr;
  float *queries = nullptr, *scores = nullptr, *responses = nullptr, *kept = nullptr, *tile_largest = nullptr,
        *bias = nullptr, *keys = nullptr, *values = nullptr;
  uint32_t *weight_pairs = nullptr, *response_pairs = nullptr;
  uint16_t *key_bits = nullptr, *value_columns = nullptr;
};

struct AttentionForwardUnit {
  int64_t batch, key_head, begin, end;  // rows [begin, end) of the key head
  bool finite;                          // false: products must skip zero weights
  bool pairs;
  bool keeps;
};

[[maybe_unused]] static void start_rows(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                                        RowState& state) {
  const bool has_sink = problem.sinks != nullptr;
  for (int lane = 0; lane < state.rows.lanes; ++lane) {
    const bool shifted = problem.weight_function == WeightFunction::kSoftmax;
    const float sink = has_sink ? problem.sinks[state.rows.head[lane]] : -INFINITY;
    state.shift[lane] = shifted ? sink : 0.0f;
    state.largest[lane] = -INFINITY;
    state.chunk_decay[lane] = 1.0f;
    state.normalizer[lane] = has_sink && sink != -INFINITY ? 1.0 : 0.0;
    state.rounded_sum[lane] = state.normalizer[lane];
    state.weight_sum[lane] = 0.0;
    state.response[lane] = 0.0;
  }
  const int64_t count = state.rows.lanes * scratch.padded_width;
  zero(state.values, count);
  zero(state.chunk_values, count);
  if (problem.saved_values != nullptr) {
    zero(state.response_values, count);
    zero(state.chunk_response_values, count);
  }
}

[[maybe_unused]] static void finish_chunk(const AttentionForwardScratch& scratch, float* values, float* chunk,
                                          const RowState& state, bool pairs) {
  for (int lane = 0; lane < state.rows.rows; ++lane)
    if (state.chunk_decay[lane] != 1.0f)
      scale_row(values + lane * scratch.padded_width, state.chunk_decay[lane], scratch.padded_width);
  if (pairs) return move_transposed(chunk, scratch.padded_width, state.rows.lanes, values);
  for (int lane = 0; lane < state.rows.rows; ++lane) {
    float* row = values + lane * scratch.padded_width;
    float* chunk_row = chunk + lane * scratch.padded_width;
    for (int64_t column = 0; column < scratch.padded_width; column += Vec::kWidth)
      store(row + column, Vec::load(row + column) + Vec::load(chunk_row + column));
    zero(chunk_row, scratch.padded_width);
  }
}

[[maybe_unused]] static void finish_chunks(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                                           RowState* states, int tiles, bool pairs) {
  for (int tile = 0; tile < tiles; ++tile) {
    RowState& state = states[tile];
    finish_chunk(scratch, state.values, state.chunk_values, state, pairs);
    if (problem.saved_values != nullptr)
      finish_chunk(scratch, state.response_values, state.chunk_response_values, state, pairs);
    for (int lane = 0; lane < state.rows.lanes; ++lane) state.chunk_decay[lane] = 1.0f;
  }
}

// Keys for products of pairs: where they lie when nothing needs padding.
[[maybe_unused]] static void set_up_pairs(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                                          const uint16_t* keys, KeyTile& tile) {
  if (scratch.padded_depth == problem.head_width && tile.count % kPairRows == 0) {
    tile.key_bits = keys;
    tile.key_bits_stride = problem.key.row_stride;
    return;
  }
  const auto bytes = static_cast<size_t>(problem.head_width) * sizeof(uint16_t);
  const auto padded_bytes = static_cast<size_t>(scratch.padded_depth) * sizeof(uint16_t);
  for (int64_t j = 0; j < core::round_up(tile.count, kPairRows); ++j) {
    uint16_t* row = scratch.key_bits + j * scratch.padded_depth;
    const size_t filled = j < tile.count ? bytes : 0;
    __builtin_memcpy(row, keys + (filled != 0 ? j * problem.key.row_stride : 0), filled);
    __builtin_memset(reinterpret_cast<char*>(row) + filled, 0, padded_bytes - filled);
  }
  tile.key_bits = scratch.key_bits;
  tile.key_bits_stride = scratch.padded_depth;
}

[[maybe_unused]] static void set_up_value_columns(const AttentionProblem& problem,
                                                  const AttentionForwardScratch& scratch, const uint16_t* values,
                                                  KeyTile& tile) {
  transpose_bfloat16(values, problem.value.row_stride, tile.count, problem.value_width, scratch.value_columns,
                     kKeyTile);
  tile.value_columns = scratch.value_columns;
}

[[maybe_unused]] static void load_key_tile(const AttentionProblem& problem, const AttentionForwardUnit& unit,
                                           AttentionForwardScratch& scratch, int64_t first, bool with_values,
                                           KeyTile& tile) {
  tile.first = first;
  tile.count = static_cast<int>(core::smaller(kKeyTile, problem.keys - first));
  const void* keys = advance(
      static_cast<const void*>(problem.key.data),
      unit.batch * problem.key.batch_stride + unit.key_head * problem.key.head_stride + first * problem.key.row_stride,
      problem.dtype);
  const void* values = advance(static_cast<const void*>(problem.value.data),
                               unit.batch * problem.value.batch_stride + unit.key_head * problem.value.head_stride +
                                   first * problem.value.row_stride,
                               problem.dtype);
  const bool direct = problem.dtype == DType::kFloat32;
  tile.keys = direct ? static_cast<const float*>(keys) : scratch.keys;
  tile.key_stride = direct ? problem.key.row_stride : problem.head_width;
  if (unit.pairs) set_up_pairs(problem, scratch, static_cast<const uint16_t*>(keys), tile);
  // Products of pairs read the keys as they are, but norms are taken of fp32.
  if (!direct && (!unit.pairs || problem.normalize_qk))
    for (int j = 0; j < tile.count; ++j)
      widen(advance(keys, j * problem.key.row_stride, problem.dtype), problem.dtype,
            scratch.keys + j * problem.head_width, problem.head_width);
  set_up_key_factors(problem, unit.batch, tile);
  if (!with_values) return;
  if (unit.pairs) return set_up_value_columns(problem, scratch, static_cast<const uint16_t*>(values), tile);
  const bool values_direct = direct && scratch.padded_width == problem.value_width;
  tile.values = values_direct ? static_cast<const float*>(values) : scratch.values;
  tile.value_stride = values_direct ? problem.value.row_stride : scratch.padded_width;
  if (values_direct) return;
  for (int j = 0; j < tile.count; ++j) {
    float* row = scratch.values + j * scratch.padded_width;
    widen(advance(values, j * problem.value.row_stride, problem.dtype), problem.dtype, row, problem.value_width);
    zero(row + problem.value_width, scratch.padded_width - problem.value_width);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
