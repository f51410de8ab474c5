// The five products of the backward pass on bfloat16 pairs (pair_product.h): operands of a unit's keys and of a tile of
// rows, and what is rounded on the way. Weights and score gradients are rounded to bfloat16; Q, K, V and dO are exact.
#pragma once

#include "cpu/differentiate_tile.h"
#include "cpu/pair_product.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct PairOperands {
  int64_t depth, value_depth;      // D and Dv padded to kPairDepth
  int64_t key_width, value_width;  // padded to vectors
  // Of all keys of the unit, tile after tile:
  uint16_t* keys;         // (keys, depth)
  uint16_t* values;       // (keys, value_depth)
  uint16_t* key_columns;  // (tiles, key_width, kKeyTile): K transposed
  // Of a tile of rows:
  uint32_t* queries;            // (depth / 2, lanes)
  uint32_t* output_gradients;   // (value_depth / 2, lanes)
  uint32_t* query_rows;         // (kRowTile / 2, key_width): pairs of rows
  uint32_t* gradient_rows;      // (kRowTile / 2, value_width): those of dO
  uint16_t* outputs;            // (kRowTile, value_depth)
  float* products_with_output;  // (kRowTile, lanes): <o, do>
  float* query_gradients;       // (key_width, lanes): dQ transposed
  // Of a tile of scores:
  uint16_t* weights;               // (kKeyTile, kRowTile)
  uint16_t* score_gradients;       // (kKeyTile, kRowTile), with the factor of the row
  uint32_t* score_gradient_pairs;  // (kKeyTile / 2, lanes), without it

  void carve(Arena& arena, const AttentionProblem& problem, int64_t unit_keys) {
    depth = core::round_up(problem.head_width, kPairDepth);
    value_depth = core::round_up(problem.value_width, kPairDepth);
    key_width = core::round_up(problem.head_width, Vec::kWidth);
    value_width = core::round_up(problem.value_width, Vec::kWidth);
    keys = arena.take<uint16_t>(unit_keys * depth);
    values = arena.take<uint16_t>(unit_keys * value_depth);
    key_columns = arena.take<uint16_t>(unit_keys * key_width);
    queries = arena.take<uint32_t>(depth / 2 * kRowTile);
    output_gradients = arena.take<uint32_t>(value_depth / 2 * kRowTile);
    query_rows = arena.take<uint32_t>(kRowTile / 2 * key_width);
    gradient_rows = arena.take<uint32_t>(kRowTile / 2 * value_width);
    outputs = arena.take<uint16_t>(kRowTile * value_depth);
    products_with_output = arena.take<float>(kRowTile * kRowTile);
    query_gradients = arena.take<float>(key_width * kRowTile);
    weights = arena.take<uint16_t>(kKeyTile * kRowTile);
    score_gradients = arena.take<uint16_t>(kKeyTile * kRowTile);
    score_gradient_pairs = arena.take<uint32_t>(kKeyTile / 2 * kRowTile);
  }
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

// Key tile `tile` of the unit, `first` its first key.
[[maybe_unused]] static void load_pair_keys(const AttentionProblem& problem, int64_t batch, int64_t key_head,
                                            int64_t first, int64_t tile, PairOperands& pairs) {
  const auto rows_of = [&](const HeadsView& view) {
    return static_cast<const uint16_t*>(view.data) + batch * view.batch_stride + key_head * view.head_stride +
           first * view.row_stride;
  };
  const int64_t count = core::smaller(kKeyTile, problem.keys - first), local = tile * kKeyTile;
  copy_padded(rows_of(problem.key), problem.key.row_stride, count, problem.head_width, pairs.keys + local * pairs.depth,
              kKeyTile, pairs.depth);
  copy_padded(rows_of(problem.value), problem.value.row_stride, count, problem.value_width,
              pairs.values + local * pairs.value_depth, kKeyTile, pairs.value_depth);
  transpose_bfloat16(rows_of(problem.key), problem.key.row_stride, count, problem.head_width,
                     pairs.key_columns + local * pairs.key_width, kKeyTile);
}

// A tile of rows: `queries` (lanes, key_width) as they are, `output_gradients` (lanes, value_width), both also
// transposed to (width, lanes).
[[maybe_unused]] static void load_pair_rows(const AttentionProblem& problem, const RowTile& rows, const float* queries,
                                            const float* transposed_queries, const float* output_gradients,
                                            const float* transposed_output_gradients, PairOperands& pairs) {
  const int64_t row_depth = core::round_up(rows.lanes, kPairDepth);
  rows_to_pairs<1>(transposed_queries, problem.head_width, pairs.depth, rows.lanes, pairs.queries);
  rows_to_pairs<1>(transposed_output_gradients, problem.value_width, pairs.value_depth, rows.lanes,
                   pairs.output_gradients);
  rows_to_pairs<1>(queries, rows.lanes, row_depth, pairs.key_width, pairs.query_rows);
  rows_to_pairs<1>(output_gradients, rows.lanes, row_depth, pairs.value_width, pairs.gradient_rows);
  zero(pairs.query_gradients, pairs.key_width * rows.lanes);
}

// <do, o> of the rows, added up as products of pairs add <do, v>: a row that attends to one key alone has o = v, and
// its score gradient <do, v> - <do, o> is then exactly 0. The pairs of dO must stand.
[[maybe_unused]] static void multiply_with_outputs(const AttentionProblem& problem, const RowTile& rows,
                                                   PairOperands& pairs, float* products) {
  for (int lane = 0; lane < rows.lanes; ++lane) {
    // Lanes past the last row hold a row again (row_tile.h); what they give is left.
    const HeadsView& view = problem.output;
    copy_padded(static_cast<const uint16_t*>(view.data) + rows.batch * view.batch_stride +
                    rows.head[lane] * view.head_stride + rows.query[lane] * view.row_stride,
                0, 1, problem.value_width, pairs.outputs + lane * pairs.value_depth, 1, pairs.value_depth);
  }
  pair_product<false>(pairs.outputs, pairs.value_depth, pairs.output_gradients, pairs.products_with_output, rows.lanes,
                      rows.lanes, pairs.value_depth);
  for (int lane = 0; lane < rows.rows; ++lane) products[lane] = pairs.products_with_output[lane * rows.lanes + lane];
}

// Scores and <do, v> of key tile `tile` as bare products, both (keys, lanes).
[[maybe_unused]] static void multiply_with_keys(const PairOperands& pairs, int64_t tile, int count, int64_t lanes,
                                                float* scores, float* value_products) {
  const int64_t padded = core::round_up(count, kPairRows), local = tile * kKeyTile;
  pair_product<false>(pairs.keys + local * pairs.depth, pairs.depth, pairs.queries, scores, padded, lanes, pairs.depth);
  pair_product<false>(pairs.values + local * pairs.value_depth, pairs.value_depth, pairs.output_gradients,
                      value_products, padded, lanes, pairs.value_depth);
}

// Rounds what two keys give 16 rows: weights, and score gradients that hold the factor of the key. The factor of the
// row goes into the copy that meets the bare query.
SIGHTLINE_INLINE void keep_rounded(const PairOperands& pairs, int64_t lanes, int64_t key, int64_t lane, Vec row_factor,
                                   Vec low_weight, Vec high_weight, Vec low_gradient, Vec high_gradient) {
  store(pairs.score_gradient_pairs + key / 2 * lanes + lane, round_to_pairs(low_gradient, high_gradient));
  uint16_t* weights = pairs.weights + key * kRowTile + lane;
  store_bfloat16(weights, low_weight);
  store_bfloat16(weights + kRowTile, high_weight);
  uint16_t* gradients = pairs.score_gradients + key * kRowTile + lane;
  store_bfloat16(gradients, low_gradient * row_factor);
  store_bfloat16(gradients + kRowTile, high_gradient * row_factor);
}

// Calls differentiate(key, gradient), which returns a weight, for all keys of 16 rows, and rounds what it gives.
template <class Differentiate>
SIGHTLINE_INLINE void round_rows(const RowTile& rows, const KeyTile& keys, int64_t lane, const PairOperands& pairs,
                                 Differentiate differentiate) {
  const Vec zeros = Vec::broadcast(0.0f), row_factor = Vec::load(rows.factor + lane);
  int64_t key = 0;
  for (; key + 2 <= keys.count; key += 2) {
    Vec low_gradient, high_gradient;
    const Vec low = differentiate(key, low_gradient);
    const Vec high = differentiate(key + 1, high_gradient);
    keep_rounded(pairs, rows.lanes, key, lane, row_factor, low, high, low_gradient, high_gradient);
  }
  if (key < keys.count) {
    Vec gradient;
    const Vec weight = differentiate(key, gradient);
    keep_rounded(pairs, rows.lanes, key, lane, row_factor, weight, zeros, gradient, zeros);
    key += 2;
  }
  for (; key < core::round_up(keys.count, kPairDepth); key += 2)
    keep_rounded(pairs, rows.lanes, key, lane, row_factor, zeros, zeros, zeros, zeros);
}

// The depth of the products over rows is padded where the tile ends in the middle of it.
[[maybe_unused]] static void pad_rounded_rows(int64_t lanes, const PairOperands& pairs) {
  if (lanes % kPairDepth == 0) return;
  for (int64_t key = 0; key < kKeyTile; ++key) {
    store_bfloat16(pairs.weights + key * kRowTile + lanes, Vec::broadcast(0.0f));
    store_bfloat16(pairs.score_gradients + key * kRowTile + lanes, Vec::broadcast(0.0f));
  }
}

// Weights and score gradients, both (keys, lanes), rounded for the products below.
[[maybe_unused]] static void round_score_gradients(const RowTile& rows, const KeyTile& keys, const float* weights,
                                                   const float* score_gradients, const PairOperands& pairs) {
  for (int64_t lane = 0; lane < rows.lanes; lane += Vec::kWidth)
    round_rows(rows, keys, lane, pairs, [&](int64_t key, Vec& gradient) {
      gradient = Vec::load(score_gradients + key * rows.lanes + lane);
      return Vec::load(weights + key * rows.lanes + lane);
    });
  pad_rounded_rows(rows.lanes, pairs);
}

// differentiate() of differentiate_tile.h and the rounding in one pass, with polynomials as exact as the rounding
// needs; for scores without extras, without dropout, and finite values.
template <class Weight, bool kReweight, TileHolds kHolds>
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
    round_rows(rows, keys, lane, pairs, [&](int64_t key, Vec& gradient) {
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
  pad_rounded_rows(rows.lanes, pairs);
}

// dV and dK of key tile `tile` += W^T dO and dS^T Q, dQ += dS K.
[[maybe_unused]] static void add_pair_gradients(const PairOperands& pairs, int64_t tile, int count, int64_t lanes,
                                                float* value_gradients, float* key_gradients) {
  const int64_t padded = core::round_up(count, kPairRows), row_depth = core::round_up(lanes, kPairDepth);
  pair_product<true>(pairs.weights, kRowTile, pairs.gradient_rows, value_gradients, padded, pairs.value_width,
                     row_depth);
  pair_product<true>(pairs.score_gradients, kRowTile, pairs.query_rows, key_gradients, padded, pairs.key_width,
                     row_depth);
  pair_product<true>(pairs.key_columns + tile * kKeyTile * pairs.key_width, kKeyTile, pairs.score_gradient_pairs,
                     pairs.query_gradients, pairs.key_width, lanes, core::round_up(count, kPairDepth));
}

}  // namespace sightline::SIGHTLINE_ISA_NS
