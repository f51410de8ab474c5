// Weighted attention, forward (MATH.md sections 1 and 2).
//
// Work: one unit is up to 512 query rows of one key head (all its query heads numbered through, see row_tile.h); units
// are handed to threads longest first. A unit walks the key tiles that any of its rows sees: scores (lanes are rows,
// see product.h), weights in place, weights times V. K and V are used where they lie when they are fp32, else widened
// tile by tile, or for many small units once (key_tiles.h): extra memory stops growing with N at 32 MiB.
//
// Sums: fp32 within a key tile, fp64 across tiles for the normalisers. Weighted values are summed in fp32 over a chunk
// of 2048 keys and chunks are added up, which keeps the error flat in N.
//
// Products of pairs (pair_product.h) take their place where the machine has them. bfloat16 is multiplied as it is:
// weights are rounded to it and the output is divided by the sum of the rounded ones. On the tile unit float16 is two
// matrices of bfloat16, and so are sixteen bits of its weights. Dropout keeps to fp32.
//
// Re-weighting sweeps twice: the first finds Z and the largest scores, the second weighs. Softplus weights of the first
// are kept for the second in up to 4 MiB a thread, else the scores are computed again. The second leaves
// out tiles in which no row has a weight that counts (tile skipping, MATH.md section 2).
//
// Non-finite numbers: the products run at full speed and let 0 * NaN through. Only a unit with rows that are not finite
// is computed again, for these, with products that skip zero weights, so finite data pays nothing.
#include <cmath>

#include "cpu/attention_decode.h"
#include "cpu/forward_pairs.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_mask.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// One tile of scores of one tile of rows: weights into the normaliser (first sweep) or into the output. `tile` has room
// for the scores, and where the unit keeps its weights it is what the first sweep leaves to the second. `tile_largest`
// receives the largest score of each row, where scores are computed.
template <class Weight, bool kReweight, bool kFirstSweep>
void process_tile(const AttentionProblem& problem, const AttentionForwardUnit& unit, AttentionForwardScratch& scratch,
                  const KeyTile& keys, float* tile, float* tile_largest, RowState& state) {
  const bool weighed = kReweight && !kFirstSweep && unit.keeps;
  if (!weighed) compute_scores(problem, state.rows, keys, state.transposed_queries, scratch.bias, tile, tile_largest);
  if (!kReweight || kFirstSweep) {
    track_largest(state, tile_largest);
    if (Weight::kShifted && shift_rises(state, tile_largest))
      raise_shift(state, tile_largest, scratch.padded_width, false);
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

  KeyTiles(const AttentionForwardScratch& scratch, int tiles) {
    int64_t first_key = INT32_MAX, last_key = -1;
    for (int tile = 0; tile < tiles; ++tile) {
      first_key = core::smaller(first_key, scratch.states[tile].rows.min_first);
      last_key = core::larger(last_key, scratch.states[tile].rows.max_last);
    }
    first = first_key / kKeyTile;
    end = last_key < first_key ? first : last_key / kKeyTile + 1;
  }
};

// Walks the key tiles of one unit, in products of pairs of kParts parts or, where that is 0, of fp32.
template <class Weight, bool kReweight, bool kFirstSweep, int kParts>
void sweep(const AttentionProblem& problem, const AttentionForwardUnit& unit, AttentionForwardScratch& scratch,
           int tiles) {
  constexpr bool kSecondSweep = kReweight && !kFirstSweep;
  constexpr int64_t kTogether = kParts > 0 ? kPairKeyTiles : 1;
  alignas(64) float unused[kRowTile];
  const KeyTiles range(scratch, tiles);
  for (int64_t begin = range.first, end; begin < range.end; begin = end) {
    end = core::smaller(range.end, core::round_up(begin + 1, kTogether));
    bool loaded[kTogether] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      RowState& state = scratch.states[tile];
      PairValues<kParts> due(problem, scratch, state);
      for (int64_t key_tile = begin; key_tile < end; ++key_tile) {
        const int64_t first_key = key_tile * kKeyTile, slot = key_tile - begin;
        const int64_t count = core::smaller(kKeyTile, problem.keys - first_key);
        if (!tile_is_visible_to_any(problem, state.rows, first_key, count)) continue;
        const int64_t place = (key_tile - range.first) * tiles + tile;
        float* tile_largest = kReweight ? scratch.tile_largest + place * kRowTile : unused;
        if (kSecondSweep && !tile_counts<Weight>(state, tile_largest)) continue;
        const KeyTile* packed = unit.packed != nullptr ? unit.packed + key_tile : nullptr;
        const bool loads = packed == nullptr || !unit.packed_completely;
        if (loads && !loaded[slot]) {
          const KeyTileMemory memory = scratch.key_memory(kParts, slot);
          KeyTile& loading = scratch.key_tiles[slot];
          load_keys<kParts>(problem, scratch, unit.batch, unit.key_head, first_key, false, packed, memory, loading);
          if (!kFirstSweep) load_values<kParts>(problem, scratch, unit.batch, unit.key_head, memory, loading);
          loaded[slot] = true;
        }
        const KeyTile& keys = loads ? scratch.key_tiles[slot] : *packed;
        float* target = kReweight && unit.keeps ? scratch.kept + place * kKeyTile * kRowTile : scratch.scores;
        float* largest = kSecondSweep ? unused : tile_largest;
        if constexpr (kParts == 0) {
          process_tile<Weight, kReweight, kFirstSweep>(problem, unit, scratch, keys, target, largest, state);
        } else {
          find_pair_weights<Weight, kReweight, kFirstSweep>(problem, scratch, keys, unit.keeps, target, largest, state,
                                                            due);
          if (!kFirstSweep) due.add(keys);
        }
      }
      if constexpr (kParts > 0) due.multiply();
    }
    if (!kFirstSweep && end % (kChunkKeys / kKeyTile) == 0)
      finish_chunks(problem, scratch, scratch.states, tiles, kParts > 0);
  }
  if (!kFirstSweep) finish_chunks(problem, scratch, scratch.states, tiles, kParts > 0);
}

template <class Weight>
bool write_rows(const AttentionProblem& problem, AttentionForwardScratch& scratch, RowState& state,
                const AttentionForwardUnit& unit) {
  const bool reweighted = problem.reweight.power > 0.0f;
  const int saved_width = reweighted ? kSavedWidthReweight : kSavedWidthPlain;
  bool finite = true;
  for (int lane = 0; lane < state.rows.rows; ++lane) {
    if (state.done[lane]) continue;
    const int64_t row_index =
        (state.rows.batch * problem.heads + state.rows.head[lane]) * problem.queries + state.rows.query[lane];
    const double divisor = reweighted ? state.weight_sum[lane] : state.normalizer[lane];
    const double applied = unit.parts == 1 ? state.rounded_sum[lane] : divisor;
    float* values = state.values + lane * scratch.padded_width;
    state.done[lane] = is_finite(values, problem.value_width);
    divide_row(values, applied, scratch.padded_width);
    narrow(values,
           advance(problem.output.data,
                   state.rows.batch * problem.output.batch_stride + state.rows.head[lane] * problem.output.head_stride +
                       state.rows.query[lane] * problem.output.row_stride,
                   problem.dtype),
           problem.dtype, problem.value_width);
    const double normalizer = state.normalizer[lane];
    const bool empty = normalizer == 0.0;
    // What does not depend on V stands from the first time, unless splitting an infinite operand made it NaN.
    const bool writes = unit.finite || problem.log_normalizer[row_index] != problem.log_normalizer[row_index];
    if (writes)
      problem.log_normalizer[row_index] =
          empty ? -INFINITY : static_cast<float>(state.shift[lane] + std::log(normalizer) + Weight::kLogUnit);
    if (writes && problem.saved_rows != nullptr) {
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
      divide_row(responses, applied, scratch.padded_width);
      float* target = problem.saved_values + row_index * problem.value_width;
      for (int64_t column = 0; column < problem.value_width; ++column) target[column] = responses[column];
    }
    finite &= state.done[lane];
  }
  return finite;
}

template <class Weight, int kParts>
bool attend(const AttentionProblem& problem, AttentionForwardUnit& unit, AttentionForwardScratch& scratch) {
  const int tiles = static_cast<int>((unit.end - unit.begin + kRowTile - 1) / kRowTile);
  const bool reweighted = problem.reweight.power > 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    RowState& state = scratch.states[tile];
    const int64_t begin = unit.begin + tile * kRowTile;
    set_up_rows(problem, unit.batch, unit.key_head, begin, static_cast<int>(core::smaller(kRowTile, unit.end - begin)),
                state.rows, scratch.queries, problem.head_width, state.transposed_queries);
    if constexpr (kParts > 0)
      rows_to_pairs<kParts>(state.transposed_queries, problem.head_width, scratch.padded_depth, state.rows.lanes,
                            state.query_pairs, scratch.query_part);
    start_rows(problem, scratch, state);
    for (int lane = 0; unit.finite && lane < state.rows.lanes; ++lane) state.done[lane] = false;
  }
  if (reweighted) {
    const KeyTiles range(scratch, tiles);
    unit.keeps &= tiles * AttentionForwardPlan::kept_bytes((range.end - range.first) * kKeyTile) <= kMostKeptBytes;
    sweep<Weight, true, true, kParts>(problem, unit, scratch, tiles);
    for (int tile = 0; tile < tiles; ++tile) {
      find_peaks<Weight>(problem, scratch.states[tile], kParts > 0);
      for (int lane = 0; lane < scratch.states[tile].rows.lanes; ++lane) scratch.states[tile].chunk_decay[lane] = 1.0f;
    }
    sweep<Weight, true, false, kParts>(problem, unit, scratch, tiles);
  } else {
    sweep<Weight, false, false, kParts>(problem, unit, scratch, tiles);
  }
  bool finite = true;
  for (int tile = 0; tile < tiles; ++tile) finite &= write_rows<Weight>(problem, scratch, scratch.states[tile], unit);
  return finite;
}

bool attend_unit(const AttentionProblem& problem, AttentionForwardUnit& unit, AttentionForwardScratch& scratch) {
  return core::with_weight(problem.weight_function, [&](auto weight) {
    return with_pair_parts(unit.parts,
                           [&](auto parts) { return attend<decltype(weight), parts>(problem, unit, scratch); });
  });
}

}  // namespace

void attention_forward(const AttentionProblem& given, const Parallel& parallel) {
  const int64_t key_heads = given.batch * given.key_heads;
  if (given.queries == 0 || key_heads == 0) return;
  if (is_decoding(given)) return attention_decode(given, parallel);
  const PackedMask mask(given, parallel);
  const AttentionProblem problem = mask.problem();
  const AttentionForwardPlan plan(problem, parallel.threads);
  PackedKeys packed(problem, plan.parts, plan.units, plan.unit_rows / kRowTile, parallel.threads);
  const int64_t together = packed.heads() > 0 ? packed.heads() : key_heads;
  for (int64_t first = 0; first < key_heads; first += together) {
    const int64_t heads = core::smaller(together, key_heads - first);
    if (packed.heads() > 0) packed.pack(parallel, first, heads);
    for_each_unit<AttentionForwardScratch>(
        parallel, plan.units * heads, plan, [&](int64_t index, AttentionForwardScratch& scratch) {
          const int64_t block = plan.units - 1 - index / heads;  // under causality the last rows see most keys
          const int64_t local = index % heads, head = first + local;
          AttentionForwardUnit unit{head / problem.key_heads,
                                    head % problem.key_heads,
                                    block * plan.unit_rows,
                                    core::smaller(plan.rows, (block + 1) * plan.unit_rows),
                                    true,
                                    plan.parts,
                                    plan.keeps,
                                    packed.heads() > 0 ? packed.of_head(local) : nullptr,
                                    packed.complete()};
          if (attend_unit(problem, unit, scratch)) return;
          unit.finite = false;
          unit.parts = 0;
          unit.packed = nullptr;
          attend_unit(problem, unit, scratch);
        });
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
