// The 16 query rows of a block: who they are, what they see, the factors of their scores, and the sum of what all
// splits found for a row.
#pragma once

#include <cmath>

#include "cuda/decode_problem.h"
#include "cuda/device.h"
#include "cuda/relative_weight.h"

namespace sightline::cuda {

// Which rows of which keys a block works on.
struct BlockPlace {
  int64_t batch, key_head, first_row;  // first_row: rho of the block's first row
  int rows;                            // live rows, at most kRowBlock
  int64_t split;
};

// Grid: x splits, y key heads and row blocks, z batch.
SIGHTLINE_DEVICE BlockPlace place_of_block(const AttentionProblem& problem) {
  const int64_t blocks = row_blocks(problem);
  const int64_t first_row = block_y() % blocks * kRowBlock;
  const int64_t rows = core::smaller(kRowBlock, group_rows(problem) - first_row);
  return {block_z(), block_y() / blocks, first_row, static_cast<int>(rows), block_x()};
}

SIGHTLINE_DEVICE int64_t packed_row(const AttentionProblem& problem, const BlockPlace& place, int row) {
  return (place.batch * problem.key_heads + place.key_head) * group_rows(problem) + place.first_row + row;
}

struct RowInfo {
  int64_t head, query;
  int32_t first, last, position;
  int32_t visible;  // n_i, where something depends on it
  float factor;     // of the product: scale, ln n_i, 1 / |q_i|
  float slope;
};

SIGHTLINE_DEVICE const char* query_row(const AttentionProblem& problem, int64_t batch, const RowInfo& row,
                                       int element_bytes) {
  return static_cast<const char*>(problem.query.data) +
         element_bytes * (batch * problem.query.batch_stride + row.head * problem.query.head_stride +
                          row.query * problem.query.row_stride);
}

SIGHTLINE_DEVICE int32_t visible_count(const DecodeProblem& problem, int64_t batch, int64_t query,
                                       const core::KeyInterval& interval) {
  if (problem.visible_keys != nullptr) return problem.visible_keys[batch * problem.attention.queries + query];
  return static_cast<int32_t>(interval.last - interval.first + 1);
}

SIGHTLINE_DEVICE float inverse_of_norm(float squares) {
  const float norm = sqrtf(squares);
  return 1.0f / (norm < core::kNormFloor ? core::kNormFloor : norm);  // NaN stays
}

// Everything but 1 / |q_i|, which set_up_queries multiplies in. By the first 16 threads of a block.
SIGHTLINE_DEVICE void set_up_row(const DecodeProblem& problem, const BlockPlace& place, int row, RowInfo& info) {
  const AttentionProblem& attention = problem.attention;
  info = {};
  info.last = -1;
  if (row >= place.rows) return;
  const int64_t rho = place.first_row + row;
  info.head = place.key_head * (attention.heads / attention.key_heads) + rho / attention.queries;
  info.query = rho % attention.queries;
  const core::KeyInterval interval = row_interval(problem, place.batch, info.query);
  info.first = static_cast<int32_t>(interval.first);
  info.last = static_cast<int32_t>(interval.last);
  info.position = static_cast<int32_t>(interval.position);
  if (counts_keys(attention)) info.visible = visible_count(problem, place.batch, info.query, interval);
  const float length = !attention.length_scale ? 1.0f
                       : info.visible > 0      ? logf(static_cast<float>(info.visible))
                                               : 0.0f;
  info.factor = (attention.scales != nullptr ? attention.scales[info.head] : problem.scale) * length;
  info.slope = attention.alibi_slopes != nullptr ? attention.alibi_slopes[info.head] : 0.0f;
}

// The keys of this block: its split of everything that any of its rows sees.
SIGHTLINE_DEVICE KeyRange keys_of_block(const RowInfo* rows, const BlockPlace& place, int64_t splits) {
  int64_t first = INT32_MAX, last = -1;
  for (int row = 0; row < place.rows; ++row) {
    if (rows[row].last < rows[row].first) continue;
    first = core::smaller(first, rows[row].first);
    last = core::larger(last, rows[row].last);
  }
  return keys_of_split(first, last, place.split, splits);
}

// What all splits together found for a row; `sink` (-inf: none) takes part like a split without values.
struct RowTotal {
  float reference;
  float largest;
  core::CompensatedSum weights;
  float divisor;
};

// By a whole warp; every lane returns the same.
SIGHTLINE_DEVICE RowTotal total_of_splits(const RowPartial* partials, int64_t splits, WeightFunction function,
                                          float sink) {
  const int lane = thread_index() % kWarpThreads;
  RowTotal total{};
  total.largest = sink;
  for (int64_t split = lane; split < splits; split += kWarpThreads)
    total.largest = fmaxf(total.largest, partials[split].largest);
  for (int mask = 1; mask < kWarpThreads; mask *= 2)
    total.largest = fmaxf(total.largest, shuffle_xor(total.largest, mask));
  total.reference = reference_of(function, total.largest);
  for (int64_t split = lane; split < splits; split += kWarpThreads) {
    const RowPartial& partial = partials[split];
    const float change = change_of_reference(function, reference_of(function, partial.largest), total.reference);
    core::add(total.weights, core::scaled({partial.weights, partial.weights_rest}, change));
    total.divisor += partial.divisor * change;
  }
  for (int mask = 1; mask < kWarpThreads; mask *= 2) {
    core::add(total.weights,
              core::CompensatedSum{shuffle_xor(total.weights.sum, mask), shuffle_xor(total.weights.rest, mask)});
    total.divisor += shuffle_xor(total.divisor, mask);
  }
  if (sink != -INFINITY) {
    const float weight = relative_weight(function, sink, total.reference);
    core::add(total.weights, weight);
    total.divisor += weight;
  }
  return total;
}

}  // namespace sightline::cuda
