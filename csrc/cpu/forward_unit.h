// What the forward pass works with: how rows are cut into units, a thread's scratch memory, the start and end of what
// rows gather, and loading a tile of keys.
#pragma once

#include "cpu/split_product.h"
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
// Key tiles that a tile of rows goes through before their weights meet the values, with products of pairs: sums of
// products are read and written once for all of them.
constexpr int64_t kPairKeyTiles = 4;
static_assert(kChunkKeys % (kPairKeyTiles * kKeyTile) == 0);

// How many matrices of bfloat16 hold the numbers of a dtype for products of pairs; 0 where these are not to be had, or
// do not pay: fp32 would take three, and the six products of their parts take as long as one of fp32.
SIGHTLINE_INLINE int pair_parts(DType dtype) {
  if (dtype == DType::kBFloat16) return kHasPairProducts ? 1 : 0;
  return dtype == DType::kFloat16 && kHasTileUnit ? 2 : 0;
}

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
    keeps = of.reweight.power > 0.0f && of.weight_function == WeightFunction::kSoftplus;
    const int64_t kept_tiles = kKeptBytes / core::larger(kept_bytes(of.keys), 1);
    if (keeps && kept_tiles > 0) tiles = core::smaller(tiles, kept_tiles);
    unit_rows = kRowTile * tiles;
    units = (rows + unit_rows - 1) / unit_rows;
  }

  int64_t key_tiles() const { return parts > 0 ? kPairKeyTiles : 1; }

  // Of a tile of rows against this many keys.
  static int64_t kept_bytes(int64_t keys) {
    return core::round_up(keys, kKeyTile) * kRowTile * static_cast<int64_t>(sizeof(float));
  }
};

struct AttentionForwardScratch {
  explicit AttentionForwardScratch(const AttentionForwardPlan& plan)

      : tile_unit(plan.parts > 0), memory(layout(plan, nullptr)) {
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
    padded_depth = core::round_up(problem.head_width, kPairDepth);
    keys = arena.take<float>(kKeyTile * padded_depth);
    values = arena.take<float>(kKeyTile * padded_width);
    key_tiles = arena.take<KeyTile>(plan.key_tiles());
    key_part = kKeyTile * padded_depth;
    column_part = padded_width * kKeyTile;
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

  TileUnit tile_unit;
  Allocation memory;
  int64_t padded_width = 0, padded_depth = 0;
  int64_t key_part = 0, column_part = 0, weight_part = 0, query_part = 0;  // of one tile: how far its parts are apart
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

// Keys of one part: where they lie when nothing needs padding. `slot` counts the tiles that are loaded together.
[[maybe_unused]] static void set_up_key_bits(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                                             const uint16_t* keys, int64_t slot, KeyTile& tile) {
  tile.key_bits_part = scratch.key_part;
  if (scratch.padded_depth == problem.head_width && tile.count % kPairRows == 0) {
    tile.key_bits = keys;
    tile.key_bits_stride = problem.key.row_stride;
    return;
  }
  const auto bytes = static_cast<size_t>(problem.head_width) * sizeof(uint16_t);
  const auto padded_bytes = static_cast<size_t>(scratch.padded_depth) * sizeof(uint16_t);
  uint16_t* rows = scratch.key_bits + slot * scratch.key_part;
  for (int64_t j = 0; j < core::round_up(tile.count, kPairRows); ++j) {
    uint16_t* row = rows + j * scratch.padded_depth;
    const size_t filled = j < tile.count ? bytes : 0;
    __builtin_memcpy(row, keys + (filled != 0 ? j * problem.key.row_stride : 0), filled);
    __builtin_memset(reinterpret_cast<char*>(row) + filled, 0, padded_bytes - filled);
  }
  tile.key_bits = rows;
  tile.key_bits_stride = scratch.padded_depth;
}

// Widens rows of keys or values, with zeros up to `padded_width`.
[[maybe_unused]] static void widen_rows(const void* rows, int64_t row_stride, DType dtype, int64_t count, int64_t width,
                                        float* to, int64_t padded_width) {
  for (int64_t row = 0; row < count; ++row) {
    widen(advance(rows, row * row_stride, dtype), dtype, to + row * padded_width, width);
    zero(to + row * padded_width + width, padded_width - width);
  }
}

template <int kParts>
static void load_pairs_of_keys(const AttentionProblem& problem, AttentionForwardScratch& scratch, const void* keys,
                               int64_t slot, KeyTile& tile) {
  if constexpr (kParts == 1) set_up_key_bits(problem, scratch, static_cast<const uint16_t*>(keys), slot, tile);
#if defined(__AMX_BF16__)
  if constexpr (kParts > 1) {
    uint16_t* bits = scratch.key_bits + slot * kParts * scratch.key_part;
    split_rows<kParts>(tile.keys, tile.key_stride, tile.count, core::round_up(tile.count, kPairRows),
                       scratch.padded_depth, bits, scratch.padded_depth, scratch.key_part);
    tile.key_bits = bits;
    tile.key_bits_stride = scratch.padded_depth;
    tile.key_bits_part = scratch.key_part;
  }
#endif
}

template <int kParts>
static void load_value_columns(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                               const void* values, int64_t slot, KeyTile& tile) {
  uint16_t* columns = scratch.value_columns + slot * kParts * scratch.column_part;
  if constexpr (kParts == 1)
    transpose_bfloat16(static_cast<const uint16_t*>(values), problem.value.row_stride, tile.count, problem.value_width,
                       columns, kKeyTile);
#if defined(__AMX_BF16__)
  if constexpr (kParts > 1)
    transpose_to_rows<kParts>(tile.values, tile.value_stride, tile.count, scratch.padded_width, columns, kKeyTile,
                              scratch.column_part);
#endif
  tile.value_columns = columns;
}

template <int kParts>
static void load_key_tile(const AttentionProblem& problem, const AttentionForwardUnit& unit,
                          AttentionForwardScratch& scratch, int64_t first, bool with_values, int64_t slot) {
  KeyTile& tile = scratch.key_tiles[slot];
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
  tile.key_stride = direct ? problem.key.row_stride : scratch.padded_depth;
  // One part is read as it is, but norms are taken of fp32.
  if (!direct && (kParts != 1 || problem.normalize_qk))
    widen_rows(keys, problem.key.row_stride, problem.dtype, tile.count, problem.head_width, scratch.keys,
               scratch.padded_depth);
  if constexpr (kParts > 0) load_pairs_of_keys<kParts>(problem, scratch, keys, slot, tile);
  set_up_key_factors(problem, unit.batch, tile);
  if (!with_values) return;
  const bool values_direct = direct && scratch.padded_width == problem.value_width;
  tile.values = values_direct ? static_cast<const float*>(values) : scratch.values;
  tile.value_stride = values_direct ? problem.value.row_stride : scratch.padded_width;
  if (!values_direct && kParts != 1)
    widen_rows(values, problem.value.row_stride, problem.dtype, tile.count, problem.value_width, scratch.values,
               scratch.padded_width);
  if constexpr (kParts > 0) load_value_columns<kParts>(problem, scratch, values, slot, tile);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
