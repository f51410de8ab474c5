// Weighted attention, forward (MATH.md sections 1 and 2).
//
// Work: one unit is up to 512 query rows of one key head (all its query heads numbered through, see row_tile.h); units
// are handed to threads longest first. A unit walks the key tiles that any of its rows sees: scores (lanes are rows,
// see product.h), weights in place, weights times V. K and V are used where they lie when they are fp32, else widened
// tile by tile, so that extra memory does not grow with N.
//
// Sums: fp32 within a key tile, fp64 across tiles for the normalisers. Weighted values are summed in fp32 over a chunk
// of 2048 keys and chunks are added up, which keeps the error flat in N.
//
// bfloat16 goes through products of pairs where the machine has them (pair_product.h): weights are rounded to bfloat16
// and the output is divided by the sum of the rounded ones. Dropout keeps to fp32.
//
// Re-weighting sweeps twice: the first finds Z and the largest score, the second weighs. Softplus weights of the first
// are kept for the second where they fit a second-level cache, else the scores are computed again.
//
// Non-finite numbers: the products run at full speed and let 0 * NaN through. Only a unit with rows that are not finite
// is computed again, for these, with products that skip zero weights, so finite data pays nothing.
#include <cmath>

#include "cpu/kernel_table.h"
#include "cpu/weigh_pairs.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// More rows per unit read K and V less often, and load or transpose them less often where they are not used as they
// lie; a unit's state should stay in a second-level cache, and there should be units enough for all threads to end
// together.
constexpr int64_t kMaxTilesPerUnit = 8;
constexpr int64_t kUnitStateBytes = 512 * 1024;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kKeptBytes = 2048 * 1024;
constexpr int64_t kChunkKeys = 2048;
// How the query rows of a key head are cut into units.
struct Plan {
  const AttentionProblem* problem;
  int64_t rows;       // G * M
  int64_t unit_rows;  // at most kMaxTilesPerUnit tiles
  int64_t units;      // per key head
  bool pairs;         // products of pairs, for units that are finite
  bool keeps;         // weights from one sweep to the next, for units in which they fit

  Plan(const AttentionProblem& of, int64_t threads) : problem(&of), rows(of.heads / of.key_heads * of.queries) {
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

struct ForwardScratch {
  explicit ForwardScratch(const Plan& plan) : tile_unit(plan.pairs), memory(layout(plan, nullptr)) {
    layout(plan, memory.get());
  }

  int64_t layout(const Plan& plan, char* base) {
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
    kept = arena.take<float>(plan.keeps ? core::smaller(kKeptBytes, tiles * Plan::kept_bytes(problem.keys)) /
                                              static_cast<int64_t>(sizeof(float))
                                        : 0);
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
  float *queries = nullptr, *scores = nullptr, *responses = nullptr, *kept = nullptr, *bias = nullptr, *keys = nullptr,
        *values = nullptr;
  uint32_t *weight_pairs = nullptr, *response_pairs = nullptr;
  uint16_t *key_bits = nullptr, *value_columns = nullptr;
};

struct Unit {
  int64_t batch, key_head, begin, end;  // rows [begin, end) of the key head
  bool finite;                          // false: products must skip zero weights
  bool pairs;
  bool keeps;
};

void start_rows(const AttentionProblem& problem, const ForwardScratch& scratch, RowState& state) {
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

void finish_chunk(const ForwardScratch& scratch, float* values, float* chunk, const RowState& state, bool pairs) {
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

void finish_chunks(const AttentionProblem& problem, const ForwardScratch& scratch, RowState* states, int tiles,
                   bool pairs) {
  for (int tile = 0; tile < tiles; ++tile) {
    RowState& state = states[tile];
    finish_chunk(scratch, state.values, state.chunk_values, state, pairs);
    if (problem.saved_values != nullptr)
      finish_chunk(scratch, state.response_values, state.chunk_response_values, state, pairs);
    for (int lane = 0; lane < state.rows.lanes; ++lane) state.chunk_decay[lane] = 1.0f;
  }
}

// Keys for products of pairs: where they lie when nothing needs padding.
void set_up_pairs(const AttentionProblem& problem, const ForwardScratch& scratch, const uint16_t* keys, KeyTile& tile) {
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

void set_up_value_columns(const AttentionProblem& problem, const ForwardScratch& scratch, const uint16_t* values,
                          KeyTile& tile) {
  transpose_bfloat16(values, problem.value.row_stride, tile.count, problem.value_width, scratch.value_columns,
                     kKeyTile);
  tile.value_columns = scratch.value_columns;
}

void load_key_tile(const AttentionProblem& problem, const Unit& unit, ForwardScratch& scratch, int64_t first,
                   bool with_values, KeyTile& tile) {
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

void track_largest(RowState& state, const float* tile_largest) {
  for (int lane = 0; lane < state.rows.lanes; ++lane)
    state.largest[lane] = tile_largest[lane] > state.largest[lane] ? tile_largest[lane] : state.largest[lane];
}

// Scores or products to pairs of weights, or in the first of two sweeps to what it gathers.
template <class Weight, bool kReweight, bool kFirstSweep, TileHolds kHolds>
void weigh_pair_tile(const AttentionProblem& problem, const ForwardScratch& scratch, const KeyTile& keys, bool keeps,
                     float* tile, RowState& state) {
  constexpr bool kTrackLargest = kHolds == TileHolds::kProducts;
  if constexpr (!kReweight) {
    weigh_pairs<Weight, kHolds, kTrackLargest, false>(state, keys, tile, scratch.weight_pairs);
  } else if constexpr (kFirstSweep) {
    if (keeps)
      weigh_pairs<Weight, kHolds, kTrackLargest, true>(state, keys, tile, nullptr);
    else
      weigh_pairs<Weight, kHolds, kTrackLargest, false>(state, keys, tile, nullptr);
  } else if (problem.saved_values == nullptr) {
    reweigh_pairs<Weight, kHolds, false>(problem, state, keys, tile, scratch.weight_pairs, nullptr);
  } else {
    reweigh_pairs<Weight, kHolds, true>(problem, state, keys, tile, scratch.weight_pairs, scratch.responses);
  }
}

template <class Weight, bool kReweight, bool kFirstSweep>
void find_pair_weights(const AttentionProblem& problem, const ForwardScratch& scratch, const KeyTile& keys, bool keeps,
                       float* tile, RowState& state) {
  if constexpr (kReweight && !kFirstSweep && !Weight::kShifted)
    if (keeps)
      return weigh_pair_tile<Weight, kReweight, kFirstSweep, TileHolds::kWeights>(problem, scratch, keys, keeps, tile,
                                                                                  state);
  pair_product<false>(keys.key_bits, keys.key_bits_stride, state.query_pairs, tile,
                      core::round_up(keys.count, kPairRows), state.rows.lanes, scratch.padded_depth);
  // A shift has to be known before the first weight.
  if (Weight::kShifted || has_extras(problem) || has_masked_entries(state.rows, keys)) {
    alignas(64) float tile_largest[kRowTile];
    finish_tile(problem, state.rows, keys, scratch.bias, tile, tile_largest);
    if (!kReweight || kFirstSweep) {
      track_largest(state, tile_largest);
      if (Weight::kShifted) raise_shift(state, tile_largest, scratch.padded_width, true);
    }
    weigh_pair_tile<Weight, kReweight, kFirstSweep, TileHolds::kScores>(problem, scratch, keys, keeps, tile, state);
  } else if constexpr (!Weight::kShifted) {
    weigh_pair_tile<Weight, kReweight, kFirstSweep, TileHolds::kProducts>(problem, scratch, keys, keeps, tile, state);
  }
}

// process_tile with products of pairs.
template <class Weight, bool kReweight, bool kFirstSweep>
void process_pair_tile(const AttentionProblem& problem, ForwardScratch& scratch, const KeyTile& keys, bool keeps,
                       float* tile, RowState& state) {
  find_pair_weights<Weight, kReweight, kFirstSweep>(problem, scratch, keys, keeps, tile, state);
  if (kFirstSweep) return;
  const int64_t depth = core::round_up(keys.count, kPairDepth);
  const auto add_values = [&](const uint32_t* pairs, float* sums) {
    pair_product<true>(keys.value_columns, kKeyTile, pairs, sums, scratch.padded_width, state.rows.lanes, depth);
  };
  add_values(scratch.weight_pairs, state.chunk_values);
  if (problem.saved_values == nullptr) return;
  round_responses(state, keys.count, scratch.responses, scratch.response_pairs);
  add_values(scratch.response_pairs, state.chunk_response_values);
}

// One tile of scores of one tile of rows: weights into the normaliser (first sweep) or into the output. `tile` has room
// for the scores, and where the unit keeps its weights it is what the first sweep leaves to the second.
template <class Weight, bool kReweight, bool kFirstSweep>
void process_tile(const AttentionProblem& problem, const Unit& unit, ForwardScratch& scratch, const KeyTile& keys,
                  float* tile, RowState& state) {
  if (unit.pairs)
    return process_pair_tile<Weight, kReweight, kFirstSweep>(problem, scratch, keys, unit.keeps, tile, state);
  const bool weighed = kReweight && !kFirstSweep && unit.keeps;
  alignas(64) float tile_largest[kRowTile];
  if (!weighed) compute_scores(problem, state.rows, keys, state.transposed_queries, scratch.bias, tile, tile_largest);
  if (!kReweight || kFirstSweep) {
    track_largest(state, tile_largest);
    if (Weight::kShifted) raise_shift(state, tile_largest, scratch.padded_width, false);
    if (kFirstSweep && !unit.keeps) return weigh<Weight, false>(state, keys.count, tile);
    weigh<Weight, true>(state, keys.count, tile);
    if (kFirstSweep) return;
  } else if (weighed) {
    reweigh<Weight, TileHolds::kWeights>(problem, state, keys.count, tile, scratch.scores, scratch.responses);
  } else {
    reweigh<Weight, TileHolds::kScores>(problem, state, keys.count, tile, scratch.scores, scratch.responses);
  }
  if (problem.dropout) {
    drop_weights(problem, state.rows, keys, scratch.scores);
    if (problem.saved_values != nullptr) drop_weights(problem, state.rows, keys, scratch.responses);
  }
  accumulate_product(unit.finite, {scratch.scores, 1, state.rows.lanes}, keys.values, keys.value_stride,
                     state.chunk_values, scratch.padded_width, state.rows.rows, scratch.padded_width, keys.count);
  if (problem.saved_values != nullptr)
    accumulate_product(unit.finite, {scratch.responses, 1, state.rows.lanes}, keys.values, keys.value_stride,
                       state.chunk_response_values, scratch.padded_width, state.rows.rows, scratch.padded_width,
                       keys.count);
}

// The key tiles that any row of the unit may see: [first, end).
struct KeyTiles {
  int64_t first, end;

  KeyTiles(const ForwardScratch& scratch, int tiles) {
    int64_t first_key = INT32_MAX, last_key = -1;
    for (int tile = 0; tile < tiles; ++tile) {
      first_key = core::smaller(first_key, scratch.states[tile].rows.min_first);
      last_key = core::larger(last_key, scratch.states[tile].rows.max_last);
    }
    first = first_key / kKeyTile;
    end = last_key < first_key ? first : last_key / kKeyTile + 1;
  }
};

template <class Weight, bool kReweight, bool kFirstSweep>
void sweep(const AttentionProblem& problem, const Unit& unit, ForwardScratch& scratch, int tiles) {
  const KeyTiles range(scratch, tiles);
  KeyTile keys;
  for (int64_t key_tile = range.first; key_tile < range.end; ++key_tile) {
    load_key_tile(problem, unit, scratch, key_tile * kKeyTile, !kFirstSweep, keys);
    for (int tile = 0; tile < tiles; ++tile) {
      RowState& state = scratch.states[tile];
      if (!tile_is_visible_to_any(state.rows, keys.first, keys.count)) continue;
      const int64_t place = (key_tile - range.first) * tiles + tile;
      float* target = kReweight && unit.keeps ? scratch.kept + place * kKeyTile * kRowTile : scratch.scores;
      process_tile<Weight, kReweight, kFirstSweep>(problem, unit, scratch, keys, target, state);
    }
    if (!kFirstSweep && (key_tile + 1) % (kChunkKeys / kKeyTile) == 0)
      finish_chunks(problem, scratch, scratch.states, tiles, unit.pairs);
  }
  if (!kFirstSweep) finish_chunks(problem, scratch, scratch.states, tiles, unit.pairs);
}

template <class Weight>
bool write_rows(const AttentionProblem& problem, ForwardScratch& scratch, RowState& state, const Unit& unit) {
  const bool reweighted = problem.reweight.power > 0.0f;
  const int saved_width = reweighted ? kSavedWidthReweight : kSavedWidthPlain;
  bool finite = true;
  for (int lane = 0; lane < state.rows.rows; ++lane) {
    if (state.done[lane]) continue;
    const int64_t row_index =
        (state.rows.batch * problem.heads + state.rows.head[lane]) * problem.queries + state.rows.query[lane];
    const double divisor = reweighted ? state.weight_sum[lane] : state.normalizer[lane];
    const double applied = unit.pairs ? state.rounded_sum[lane] : divisor;
    const float inverse = applied == 0.0 ? 0.0f : static_cast<float>(1.0 / applied);
    float* values = state.values + lane * scratch.padded_width;
    state.done[lane] = is_finite(values, problem.value_width);
    scale_row(values, inverse, scratch.padded_width);
    narrow(values,
           advance(problem.output.data,
                   state.rows.batch * problem.output.batch_stride + state.rows.head[lane] * problem.output.head_stride +
                       state.rows.query[lane] * problem.output.row_stride,
                   problem.dtype),
           problem.dtype, problem.value_width);
    const double normalizer = state.normalizer[lane];
    const bool empty = normalizer == 0.0;
    // What does not depend on V stands from the first time.
    if (unit.finite)
      problem.log_normalizer[row_index] =
          empty ? -INFINITY : static_cast<float>(state.shift[lane] + std::log(normalizer) + Weight::kLogUnit);
    if (unit.finite && problem.saved_rows != nullptr) {
      float* saved = problem.saved_rows + row_index * saved_width;
      saved[kSavedShift] = state.shift[lane] == -INFINITY ? 0.0f : state.shift[lane];
      // A row that sees no key has no gradient, also where a sink gives it a normaliser.
      const bool sees_nothing = state.largest[lane] == -INFINITY && normalizer == normalizer;
      saved[kSavedNormalizer] = sees_nothing ? 0.0f : static_cast<float>(normalizer);
      if (reweighted) {
        const bool flat = state.flat[lane] == 1.0f;
        saved[kSavedMean] = state.mean[lane];
        saved[kSavedPeak] = flat ? 1.0f : 1.0f / state.inverse_peak[lane];
        saved[kSavedWeightSum] = flat ? 0.0f : static_cast<float>(divisor);
        saved[kSavedResponse] = flat || applied == 0.0 ? 0.0f : static_cast<float>(state.response[lane] / applied);
      }
    }
    if (problem.saved_values != nullptr) {
      float* responses = state.response_values + lane * scratch.padded_width;
      state.done[lane] = state.done[lane] && is_finite(responses, problem.value_width);
      scale_row(responses, inverse, scratch.padded_width);
      float* target = problem.saved_values + row_index * problem.value_width;
      for (int64_t column = 0; column < problem.value_width; ++column) target[column] = responses[column];
    }
    finite &= state.done[lane];
  }
  return finite;
}

template <class Weight>
bool attend(const AttentionProblem& problem, Unit& unit, ForwardScratch& scratch) {
  const int tiles = static_cast<int>((unit.end - unit.begin + kRowTile - 1) / kRowTile);
  const bool reweighted = problem.reweight.power > 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    RowState& state = scratch.states[tile];
    const int64_t begin = unit.begin + tile * kRowTile;
    set_up_rows(problem, unit.batch, unit.key_head, begin, static_cast<int>(core::smaller(kRowTile, unit.end - begin)),
                state.rows, scratch.queries, problem.head_width, state.transposed_queries);
    if (unit.pairs)
      round_to_pairs(state.transposed_queries, problem.head_width, scratch.padded_depth, state.rows.lanes,
                     state.query_pairs);
    start_rows(problem, scratch, state);
    for (int lane = 0; unit.finite && lane < state.rows.lanes; ++lane) state.done[lane] = false;
  }
  if (reweighted) {
    const KeyTiles range(scratch, tiles);
    unit.keeps &= tiles * Plan::kept_bytes((range.end - range.first) * kKeyTile) <= kKeptBytes;
    sweep<Weight, true, true>(problem, unit, scratch, tiles);
    for (int tile = 0; tile < tiles; ++tile) {
      find_peaks<Weight>(problem, scratch.states[tile], unit.pairs);
      for (int lane = 0; lane < scratch.states[tile].rows.lanes; ++lane) scratch.states[tile].chunk_decay[lane] = 1.0f;
    }
    sweep<Weight, true, false>(problem, unit, scratch, tiles);
  } else {
    sweep<Weight, false, false>(problem, unit, scratch, tiles);
  }
  bool finite = true;
  for (int tile = 0; tile < tiles; ++tile) finite &= write_rows<Weight>(problem, scratch, scratch.states[tile], unit);
  return finite;
}

bool attend_unit(const AttentionProblem& problem, Unit& unit, ForwardScratch& scratch) {
  return problem.weight_function == WeightFunction::kSoftmax ? attend<core::Exponential>(problem, unit, scratch)
                                                             : attend<core::SoftPlus>(problem, unit, scratch);
}

}  // namespace

void attention_forward(const AttentionProblem& problem, const Parallel& parallel) {
  const int64_t key_heads = problem.batch * problem.key_heads;
  if (problem.queries == 0 || key_heads == 0) return;
  const Plan plan(problem, parallel.threads);
  for_each_unit<ForwardScratch>(
      parallel, plan.units * key_heads, plan, [&plan, key_heads](int64_t index, ForwardScratch& scratch) {
        const AttentionProblem& task = *plan.problem;
        const int64_t block = plan.units - 1 - index / key_heads;  // under causality the last rows see most keys
        const int64_t head = index % key_heads;
        Unit unit{head / task.key_heads,
                  head % task.key_heads,
                  block * plan.unit_rows,
                  core::smaller(plan.rows, (block + 1) * plan.unit_rows),
                  true,
                  plan.pairs,
                  plan.keeps};
        if (attend_unit(task, unit, scratch)) return;
        unit.finite = unit.pairs = false;
        attend_unit(task, unit, scratch);
      });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
