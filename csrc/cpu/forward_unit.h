// What the forward pass works with: how rows are cut into units, a thread's scratch memory, the start and end of what
// rows gather, and loading a tile of keys.
#pragma once

#include "cpu/key_tiles.h"
#include "cpu/weigh_pairs.h"

namespace sightline::SIGHTLINE_ISA_NS {

// How the query rows of a key head are cut into units.
struct AttentionForwardPlan {
  const AttentionProblem* problem;
  int64_t rows;       // G * M
  int64_t unit_rows;  // at most kMaxTilesPerUnit tiles
  int64_t units;      // per key head
  int parts;          // of products of pairs, for units that are finite; 0: products of fp32
  bool keeps;         // weights from one sweep to the next, for units in which they fit

  AttentionForwardPlan(const AttentionProblem& of, int64_t threads)
      : problem(&of), rows(of.heads / of.key_heads * of.queries) {
    parts = of.dropout ? 0 : pair_parts(of.dtype);
    const int64_t tile_bytes = kRowTile * static_cast<int64_t>(sizeof(float)) * (of.head_width + 2 * of.value_width);
    int64_t tiles = core::smaller(kMaxTilesPerUnit, core::larger(1, kUnitStateBytes / tile_bytes));
    const int64_t all_tiles = (rows + kRowTile - 1) / kRowTile * of.batch * of.key_heads;
    tiles = core::smaller(tiles, core::larger(1, all_tiles / (kUnitsPerThread * threads)));
    keeps = of.reweight.power > 0.0f && !core::is_shifted(of.weight_function);
    keeps &= kept_bytes(of.keys) <= kMostKeptBytes || of.causal || of.window_left >= 0;
    if (keeps) tiles = core::smaller(tiles, core::larger(1, kKeptBytes / core::larger(kept_bytes(of.keys), 1)));
    unit_rows = kRowTile * tiles;
    units = (rows + unit_rows - 1) / unit_rows;
  }

  int64_t key_tiles() const { return parts > 0 ? kPairKeyTiles : 1; }

  // Of a tile of rows against this many keys.
  static int64_t kept_bytes(int64_t keys) {
    return core::round_up(keys, kKeyTile) * kRowTile * static_cast<int64_t>(sizeof(float));
  }
};

struct AttentionForwardScratch : KeyTileSizes {
  explicit AttentionForwardScratch(const AttentionForwardPlan& plan)
      : KeyTileSizes(*plan.problem), tile_unit(plan.parts > 0), memory(layout(plan, nullptr)) {
    layout(plan, memory.get());
  }

  int64_t layout(const AttentionForwardPlan& plan, char* base) {
    const AttentionProblem& problem = *plan.problem;
    // One-row decoding must not pay for clearing and mapping the memory of full tiles.
    const int64_t tile_rows = core::smaller(kRowTile, core::round_up(plan.rows, Vec::kWidth));
    const int64_t tiles = core::smaller(plan.unit_rows, core::round_up(plan.rows, kRowTile)) / kRowTile;
    Arena arena(base);
    const bool saves_response = problem.saved_values != nullptr;
    states = arena.take<RowState>(tiles);
    queries = arena.take<float>(tile_rows * problem.head_width);
    scores = arena.take<float>(tile_rows * kKeyTile);
    responses = arena.take<float>(saves_response ? tile_rows * kKeyTile : 0);
    kept = arena.take<float>(
        plan.keeps ? core::smaller(kMostKeptBytes, tiles * AttentionForwardPlan::kept_bytes(problem.keys)) /
                         static_cast<int64_t>(sizeof(float))
                   : 0);
    tile_largest = arena.take<float>(
        problem.reweight.power > 0.0f ? tiles * core::round_up(problem.keys, kKeyTile) / kKeyTile * kRowTile : 0);
    bias = arena.take<float>(problem.attn_mask.kind != MaskKind::kNone ? tile_rows * kKeyTile : 0);
    keys = arena.take<float>(key_part);
    values = arena.take<float>(column_part);
    key_tiles = arena.take<KeyTile>(plan.key_tiles());
    weight_part = tile_rows * kKeyTile / 2;
    query_part = tile_rows * padded_depth / 2;
    const int64_t tile_parts = kPairKeyTiles * plan.parts;
    key_bits = arena.take<uint16_t>(tile_parts * key_part);
    value_columns = arena.take<uint16_t>(tile_parts * column_part);
    weight_pairs = arena.take<uint32_t>(tile_parts * weight_part);
    response_pairs = arena.take<uint32_t>(saves_response ? tile_parts * weight_part : 0);
    const int64_t tile_values = tile_rows * padded_width;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* transposed = arena.take<float>(tile_rows * problem.head_width);
      uint32_t* query_pairs = arena.take<uint32_t>(plan.parts * query_part);
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

  // Of the tile that is loaded as number `slot` of those loaded together.
  KeyTileMemory key_memory(int parts, int64_t slot) const {
    return {keys, values, key_bits + slot * parts * key_part, value_columns + slot * parts * column_part};
  }

  TileUnit tile_unit;
  Allocation memory;
  int64_t weight_part = 0, query_part = 0;  // how far the parts of a tile are apart
  RowState* states = nullptr;
  KeyTile* key_tiles = nullptr;
  float *queries = nullptr, *scores = nullptr, *responses = nullptr, *kept = nullptr, *tile_largest = nullptr,
        *bias = nullptr, *keys = nullptr, *values = nullptr;
  uint32_t *weight_pairs = nullptr, *response_pairs = nullptr;
  uint16_t *key_bits = nullptr, *value_columns = nullptr;
};

struct AttentionForwardUnit {
  int64_t batch, key_head, begin, end;  // rows [begin, end) of the key head
  bool finite;                          // false: products must skip zero weights
  int parts;
  bool keeps;
  const KeyTile* packed;  // the tiles of the key head, where they are packed
  bool packed_completely;
};

[[maybe_unused]] static void start_rows(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                                        RowState& state) {
  const bool has_sink = problem.sinks != nullptr;
  const bool shifted = core::is_shifted(problem.weight_function);
  for (int lane = 0; lane < state.rows.lanes; ++lane) {
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
  if (kHasPairProducts && pairs) return move_transposed(chunk, scratch.padded_width, state.rows.lanes, values);
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

}  // namespace sightline::SIGHTLINE_ISA_NS
