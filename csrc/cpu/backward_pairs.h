// The five products of the backward pass on bfloat16 pairs (pair_product.h): operands of a unit's keys and of a tile of
// rows, and what is rounded on the way. Q, K, V and dO are exact, in one part or, for float16, in two. Weights and
// score gradients are rounded to as many parts. Of one part, the factor of a row goes into the score gradients that
// meet the bare query; in two, score gradients are rounded once, and the query that they meet has the factor.
#pragma once

#include "cpu/differentiate_tile.h"
#include "cpu/split_product.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct PairOperands {
  int64_t parts;
  int64_t depth, value_depth;      // D and Dv padded to kPairDepth
  int64_t key_width, value_width;  // padded to vectors
  // Of all keys of the unit, tile after tile:
  uint16_t* keys;         // (tiles, parts, kKeyTile, depth)
  uint16_t* values;       // (tiles, parts, kKeyTile, value_depth)
  uint16_t* key_columns;  // (tiles, parts, key_width, kKeyTile): K transposed
  // Of a tile of rows:
  uint32_t* queries;           // (parts, depth / 2, lanes)
  uint32_t* output_gradients;  // (parts, value_depth / 2, lanes)
  uint32_t* query_rows;        // (parts, kRowTile / 2, key_width): pairs of rows
  uint32_t* gradient_rows;     // (parts, kRowTile / 2, value_width): those of dO
  float* query_gradients;      // (key_width, lanes): dQ transposed
  // Of a tile of rows while it is loaded:
  uint16_t* outputs;            // (parts, kRowTile, value_depth)
  float* products_with_output;  // (kRowTile, lanes): <o, do>
  // Of a tile of scores:
  uint16_t* weights;               // (parts, kKeyTile, kRowTile)
  uint16_t* score_gradients;       // (parts, kKeyTile, kRowTile), as they meet the query
  uint32_t* score_gradient_pairs;  // (parts, kKeyTile / 2, lanes), without the factor of the row

  // What the tiles of rows of a unit share.
  void carve(Arena& arena, const AttentionProblem& problem, int64_t unit_keys, int of_parts) {
    parts = of_parts;
    depth = core::round_up(problem.head_width, kPairDepth);
    value_depth = core::round_up(problem.value_width, kPairDepth);
    key_width = core::round_up(problem.head_width, Vec::kWidth);
    value_width = core::round_up(problem.value_width, Vec::kWidth);
    keys = arena.take<uint16_t>(parts * unit_keys * depth);
    values = arena.take<uint16_t>(parts * unit_keys * value_depth);
    key_columns = arena.take<uint16_t>(parts * unit_keys * key_width);
    outputs = arena.take<uint16_t>(parts * kRowTile * value_depth);
    products_with_output = arena.take<float>(kRowTile * kRowTile);
    weights = arena.take<uint16_t>(parts * kTilePart);
    score_gradients = arena.take<uint16_t>(parts * kTilePart);
    score_gradient_pairs = arena.take<uint32_t>(parts * kTilePart / 2);
  }

  // What a tile of rows has for itself.
  void carve_rows(Arena& arena) {
    queries = arena.take<uint32_t>(parts * depth / 2 * kRowTile);
    output_gradients = arena.take<uint32_t>(parts * value_depth / 2 * kRowTile);
    query_rows = arena.take<uint32_t>(parts * kRowTile / 2 * key_width);
    gradient_rows = arena.take<uint32_t>(parts * kRowTile / 2 * value_width);
    query_gradients = arena.take<float>(key_width * kRowTile);
  }

  // Operands of the products, of key tile `tile` of the unit and of `lanes` rows.
  SplitRows keys_of(int64_t tile) const { return {keys + tile * parts * kKeyTile * depth, depth, kKeyTile * depth}; }
  SplitRows values_of(int64_t tile) const {
    return {values + tile * parts * kKeyTile * value_depth, value_depth, kKeyTile * value_depth};
  }
  SplitRows key_columns_of(int64_t tile) const {
    return {key_columns + tile * parts * kKeyTile * key_width, kKeyTile, kKeyTile * key_width};
  }
  SplitRows output_rows() const { return {outputs, value_depth, kRowTile * value_depth}; }
  SplitRows weight_rows() const { return {weights, kRowTile, kTilePart}; }
  SplitRows score_gradient_rows() const { return {score_gradients, kRowTile, kTilePart}; }
  SplitPairs query_lanes(int64_t lanes) const { return {queries, kPanelLanes, depth / 2 * kRowTile, lanes}; }
  SplitPairs output_gradient_lanes(int64_t lanes) const {
    return {output_gradients, kPanelLanes, value_depth / 2 * kRowTile, lanes};
  }
  SplitPairs query_columns() const { return {query_rows, kPanelLanes, kRowTile / 2 * key_width, key_width}; }
  SplitPairs gradient_columns() const { return {gradient_rows, kPanelLanes, kRowTile / 2 * value_width, value_width}; }
  SplitPairs score_gradient_lanes(int64_t lanes) const {
    return {score_gradient_pairs, kPanelLanes, kTilePart / 2, lanes};
  }

 private:
  static constexpr int64_t kTilePart = kKeyTile * kRowTile;
};

// `count` rows of `width` numbers, zeros up to `padded_width` and up to row `padded_count`.
[[maybe_unused]] static void copy_padded(const uint16_t* from, int64_t row_stride, int64_t count, int64_t width,
                                         uint16_t* to, int64_t padded_count, int64_t padded_width) {
  const auto bytes = static_cast<size_t>(width) * sizeof(uint16_t);
  const auto rest = static_cast<size_t>(padded_width - width) * sizeof(uint16_t);
  for (int64_t row = 0; row < count; ++row) {
    uint16_t* target = to + row * padded_width;
    __builtin_memcpy(target, from + row * row_stride, bytes);
    __builtin_memset(target + width, 0, rest);
  }
  __builtin_memset(to + count * padded_width, 0,
                   static_cast<size_t>((padded_count - count) * padded_width) * sizeof(uint16_t));
}

// Key tile `tile` of the unit, `first` its first key; as fp32 they are `keys` (keys, key_width) and `values` (keys,
// value_width).
template <int kParts>
static void load_pair_keys(const AttentionProblem& problem, int64_t batch, int64_t key_head, int64_t first,
                           int64_t tile, const float* keys, const float* values, const PairOperands& pairs) {
  const int64_t count = core::smaller(kKeyTile, problem.keys - first);
  const SplitRows key_rows = pairs.keys_of(tile), columns = pairs.key_columns_of(tile);
  const SplitRows value_rows = pairs.values_of(tile);
  const auto writable = [](const SplitRows& rows) { return const_cast<uint16_t*>(rows.data); };
  if constexpr (kParts == 1) {
    const auto rows_of = [&](const HeadsView& view) {
      return static_cast<const uint16_t*>(row_of(view, problem.dtype, batch, key_head, first));
    };
    copy_padded(rows_of(problem.key), problem.key.row_stride, count, problem.head_width, writable(key_rows), kKeyTile,
                pairs.depth);
    copy_padded(rows_of(problem.value), problem.value.row_stride, count, problem.value_width, writable(value_rows),
                kKeyTile, pairs.value_depth);
    transpose_bfloat16(rows_of(problem.key), problem.key.row_stride, count, problem.head_width, writable(columns),
                       kKeyTile);
  } else {
    const int64_t padded = core::round_up(count, kPairRows);
    split_rows<kParts>(keys, pairs.key_width, count, pairs.key_width, padded, writable(key_rows), key_rows.stride,
                       key_rows.part);
    split_rows<kParts>(values, pairs.value_width, count, pairs.value_width, padded, writable(value_rows),
                       value_rows.stride, value_rows.part);
    transpose_to_rows<kParts>(keys, pairs.key_width, count, pairs.key_width, writable(columns), columns.stride,
                              columns.part);
  }
}

// A tile of rows: `queries` (lanes, key_width) as they meet the score gradients, `output_gradients` (lanes,
// value_width), and both as they are, transposed to (width, lanes).
template <int kParts>
static void load_pair_rows(const AttentionProblem& problem, const RowTile& rows, const float* queries,
                           const float* transposed_queries, const float* output_gradients,
                           const float* transposed_output_gradients, const PairOperands& pairs) {
  const int64_t row_depth = core::round_up(rows.lanes, kPairDepth);
  rows_to_pairs<kParts>(transposed_queries, problem.head_width, pairs.depth, rows.lanes, pairs.queries,
                        pairs.query_lanes(rows.lanes).part);
  rows_to_pairs<kParts>(transposed_output_gradients, problem.value_width, pairs.value_depth, rows.lanes,
                        pairs.output_gradients, pairs.output_gradient_lanes(rows.lanes).part);
  rows_to_pairs<kParts>(queries, rows.lanes, row_depth, pairs.key_width, pairs.query_rows, pairs.query_columns().part);
  rows_to_pairs<kParts>(output_gradients, rows.lanes, row_depth, pairs.value_width, pairs.gradient_rows,
                        pairs.gradient_columns().part);
  zero(pairs.query_gradients, pairs.key_width * rows.lanes);
}

// <do, o> of the rows, added up as products of pairs add <do, v>: a row that attends to one key alone has o = v, and
// its score gradient <do, v> - <do, o> is then exactly 0. The pairs of dO must stand; `row` has room for value_width.
template <int kParts>
static void multiply_with_outputs(const AttentionProblem& problem, const RowTile& rows, const PairOperands& pairs,
                                  float* row, float* products) {
  const SplitRows outputs = pairs.output_rows();
  for (int lane = 0; lane < rows.lanes; ++lane) {
    // Lanes past the last row hold a row again (row_tile.h); what they give is left.
    const void* output = row_of(problem.output, problem.dtype, rows.batch, rows.head[lane], rows.query[lane]);
    uint16_t* target = pairs.outputs + lane * pairs.value_depth;
    if constexpr (kParts == 1) {
      copy_padded(static_cast<const uint16_t*>(output), 0, 1, problem.value_width, target, 1, pairs.value_depth);
    } else {
      widen(output, problem.dtype, row, problem.value_width);
      zero(row + problem.value_width, pairs.value_width - problem.value_width);
      split_rows<kParts>(row, 0, 1, pairs.value_width, 1, target, outputs.stride, outputs.part);
    }
  }
  const TileFactors factors{outputs, pairs.output_gradient_lanes(rows.lanes), pairs.value_depth};
  pair_products<kParts, kParts, false>(&factors, 1, pairs.products_with_output, rows.lanes, rows.lanes, rows.lanes);
  for (int lane = 0; lane < rows.rows; ++lane) products[lane] = pairs.products_with_output[lane * rows.lanes + lane];
}

// Scores and <do, v> of key tile `tile` as bare products, both (keys, lanes). Scores have all bits, as forward takes
// them.
template <int kParts>
static void multiply_with_keys(const PairOperands& pairs, int64_t tile, int count, int64_t lanes, float* scores,
                               float* value_products) {
  const int64_t padded = core::round_up(count, kPairRows);
  const TileFactors with_queries{pairs.keys_of(tile), pairs.query_lanes(lanes), pairs.depth};
  const TileFactors with_gradients{pairs.values_of(tile), pairs.output_gradient_lanes(lanes), pairs.value_depth};
  pair_products<kParts, kParts, false, true>(&with_queries, 1, scores, lanes, padded, lanes);
  pair_products<kParts, kParts, false>(&with_gradients, 1, value_products, lanes, padded, lanes);
}

// Rounds what two keys give 16 rows: weights, and score gradients that hold the factor of the key.
template <int kParts>
SIGHTLINE_INLINE void keep_rounded(const PairOperands& pairs, int64_t lanes, int64_t key, int64_t lane, Vec row_factor,
                                   Vec low_weight, Vec high_weight, Vec low_gradient, Vec high_gradient) {
  uint16_t* weights = pairs.weights + key * kRowTile + lane;
  uint16_t* gradients = pairs.score_gradients + key * kRowTile + lane;
  uint32_t* gradient_pairs = pairs.score_gradient_pairs + key / 2 * lanes + lane;
  if constexpr (kParts == 1) {
    store(gradient_pairs, round_to_pairs(low_gradient, high_gradient));
    store_bfloat16(weights, low_weight);
    store_bfloat16(weights + kRowTile, high_weight);
    store_bfloat16(gradients, low_gradient * row_factor);
    store_bfloat16(gradients + kRowTile, high_gradient * row_factor);
  } else {
    for_each_part<kParts>([&](int part, auto last) SIGHTLINE_INLINE_LAMBDA {
      const int64_t offset = part * kKeyTile * kRowTile;
      store_apart(weights + offset, weights + offset + kRowTile, split_row<last>(low_weight, high_weight));
      const Pairs rounded = split_row<last>(low_gradient, high_gradient);
      store_apart(gradients + offset, gradients + offset + kRowTile, rounded);
      store(gradient_pairs + offset / 2, interleave(rounded));
    });
  }
}

// Calls differentiate(key, gradient), which returns a weight, for all keys of 16 rows, and rounds what it gives.
template <int kParts, class Differentiate>
SIGHTLINE_INLINE void round_rows(const RowTile& rows, const KeyTile& keys, int64_t lane, const PairOperands& pairs,
                                 Differentiate differentiate) {
  keep_tile_unit_awake();
  const Vec zeros = Vec::broadcast(0.0f), row_factor = Vec::load(rows.factor + lane);
  int64_t key = 0;
  for (; key + 2 <= keys.count; key += 2) {
    Vec low_gradient, high_gradient;
    const Vec low = differentiate(key, low_gradient);
    const Vec high = differentiate(key + 1, high_gradient);
    keep_rounded<kParts>(pairs, rows.lanes, key, lane, row_factor, low, high, low_gradient, high_gradient);
  }
  if (key < keys.count) {
    Vec gradient;
    const Vec weight = differentiate(key, gradient);
    keep_rounded<kParts>(pairs, rows.lanes, key, lane, row_factor, weight, zeros, gradient, zeros);
    key += 2;
  }
  for (; key < core::round_up(keys.count, kPairDepth); key += 2)
    keep_rounded<kParts>(pairs, rows.lanes, key, lane, row_factor, zeros, zeros, zeros, zeros);
}

// The depth of the products over rows is padded where the tile ends in the middle of it.
template <int kParts>
static void pad_rounded_rows(int64_t lanes, const PairOperands& pairs) {
  if (lanes % kPairDepth == 0) return;
  for (int64_t key = 0; key < kParts * kKeyTile; ++key) {
    store_bfloat16(pairs.weights + key * kRowTile + lanes, Vec::broadcast(0.0f));
    store_bfloat16(pairs.score_gradients + key * kRowTile + lanes, Vec::broadcast(0.0f));
  }
}

// Weights and score gradients, both (keys, lanes), rounded for the products below.
template <int kParts>
static void round_score_gradients(const RowTile& rows, const KeyTile& keys, const float* weights,
                                  const float* score_gradients, const PairOperands& pairs) {
  for (int64_t lane = 0; lane < rows.lanes; lane += Vec::kWidth)
    round_rows<kParts>(rows, keys, lane, pairs, [&](int64_t key, Vec& gradient) {
      gradient = Vec::load(score_gradients + key * rows.lanes + lane);
      return Vec::load(weights + key * rows.lanes + lane);
    });
  pad_rounded_rows<kParts>(rows.lanes, pairs);
}

// differentiate() of differentiate_tile.h and the rounding in one pass, with polynomials as exact as the rounding
// needs; for scores without extras, without dropout, and finite values.
template <class Weight, int kParts, bool kReweight, TileHolds kHolds>
static void differentiate_to_pairs(const AttentionProblem& problem, const RowTile& rows, const RowGradients& state,
                                   const KeyTile& keys, const float* tile, const float* value_products,
                                   const PairOperands& pairs) {
  const Vec zeros = Vec::broadcast(0.0f), log2_e = Vec::broadcast(core::kLog2E);
  const float power = problem.reweight.power;
  for (int64_t lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
    const Vec row_factor = Vec::load(rows.factor + lane);
    const Vec shift = Vec::load(state.shift + lane) * log2_e;
    const Vec inverse_normalizer = Vec::load(state.inverse_normalizer + lane);
    const Vec delta = Vec::load(state.delta + lane);
    const Vec plain_delta = delta - Vec::load(state.log_gradient + lane);
    const Vec mean = Vec::load(state.mean + lane), inverse_peak = Vec::load(state.inverse_peak + lane);
    const Vec inverse_weight_sum = Vec::load(state.inverse_weight_sum + lane);
    const Vec response_factor = Vec::load(state.response_factor + lane), coupling = Vec::load(state.coupling + lane);
    const Mask flat = equal(Vec::load(state.flat + lane), Vec::broadcast(1.0f));
    round_rows<kParts>(rows, keys, lane, pairs, [&](int64_t key, Vec& gradient) {
      const Vec entry = Vec::load(tile + key * rows.lanes + lane);
      const Vec value_product = Vec::load(value_products + key * rows.lanes + lane);
      const Vec key_factor = Vec::broadcast(keys.factor[key]);
      Vec x = (kHolds == TileHolds::kProducts ? entry * (row_factor * key_factor) : entry) * log2_e;
      if (Weight::kShifted) x = x - shift;
      Vec slope;
      const Vec weight = Weight::forward_and_derivative_short(x, slope);
      Vec attention = weight * inverse_normalizer;
      gradient = (value_product - plain_delta) * inverse_normalizer;
      if (kReweight) {
        const Vec excess = maximum(zeros, weight - mean) * inverse_peak;
        const Vec response = response_of(excess, power);
        attention = select(flat, attention, response * excess * inverse_weight_sum);
        gradient = select(flat, gradient, response * response_factor * (value_product - delta) - coupling);
      }
      gradient = gradient * slope * key_factor;
      return attention;
    });
  }
  pad_rounded_rows<kParts>(rows.lanes, pairs);
}

// dV and dK of key tile `tile` += W^T dO and dS^T Q, dQ += dS K.
template <int kParts>
static void add_pair_gradients(const PairOperands& pairs, int64_t tile, int count, int64_t lanes,
                               float* value_gradients, float* key_gradients) {
  const int64_t padded = core::round_up(count, kPairRows), row_depth = core::round_up(lanes, kPairDepth);
  const TileFactors of_values{pairs.weight_rows(), pairs.gradient_columns(), row_depth};
  const TileFactors of_keys{pairs.score_gradient_rows(), pairs.query_columns(), row_depth};
  const TileFactors of_queries{pairs.key_columns_of(tile), pairs.score_gradient_lanes(lanes),
                               core::round_up(count, kPairDepth)};
  pair_products<kParts, kParts, true>(&of_values, 1, value_gradients, pairs.value_width, padded, pairs.value_width);
  pair_products<kParts, kParts, true>(&of_keys, 1, key_gradients, pairs.key_width, padded, pairs.key_width);
  pair_products<kParts, kParts, true>(&of_queries, 1, pairs.query_gradients, lanes, pairs.key_width, lanes);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
