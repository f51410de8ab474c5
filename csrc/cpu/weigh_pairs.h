// From scores to bfloat16 weights in pairs, for products of pairs (pair_product.h): weigh_tile.h's work in one pass,
// with polynomials as exact as the rounding needs.
#pragma once

#include "cpu/pair_product.h"
#include "cpu/weigh_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Per 16 lanes of a tile of `keys.count` keys, two keys at a time: x = log2(e) (score - shift) to `weigh(x, key)`, and
// pairs of what that returns to `pairs`, unless that is null, in a depth padded with zeros.
template <class Weight, TileHolds kHolds, class Weigh>
SIGHTLINE_INLINE void map_to_pairs(const RowState& state, const KeyTile& keys, const float* tile, int lane,
                                   uint32_t* pairs, Vec& rounded_sum, Weigh weigh) {
  static_assert(!Weight::kShifted || kHolds == TileHolds::kScores);
  const int64_t lanes = state.rows.lanes;
  const Vec log2_e = Vec::broadcast(core::kLog2E), zeros = Vec::broadcast(0.0f);
  const Vec row_factor = Vec::load(state.rows.factor + lane);
  Vec shift = Vec::load(state.shift + lane);
  shift = select(equal(shift, Vec::broadcast(-INFINITY)), zeros, shift);
  const auto weight_of = [&](int key) {
    const Vec entry = Vec::load(tile + key * lanes + lane);
    // Multiplied as finish_scores() does it: a row's bits must not depend on the tiles in which it is masked.
    if (kHolds == TileHolds::kProducts)
      return weigh(entry * (row_factor * Vec::broadcast(keys.factor[key])) * log2_e, key);
    if (kHolds == TileHolds::kWeights) return weigh(entry, key);
    // In this order: log2(e) times a score may overflow.
    return weigh((Weight::kShifted ? entry - shift : entry) * log2_e, key);
  };
  const auto keep = [&](int key, Vec low, Vec high) {
    if (pairs == nullptr) return;
    const Pairs rounded = round_to_pairs(low, high);
    rounded_sum = add_pairs(rounded_sum, rounded);
    store(pairs + key / 2 * lanes + lane, rounded);
  };
  int key = 0;
  for (; key + 2 <= keys.count; key += 2) {
    const Vec low = weight_of(key);
    keep(key, low, weight_of(key + 1));
  }
  if (key < keys.count) {
    keep(key, weight_of(key), zeros);
    key += 2;
  }
  for (; key < core::round_up(keys.count, kPairDepth); key += 2) keep(key, zeros, zeros);
}

SIGHTLINE_INLINE void add_lanes(double* sums, Vec values) {
  alignas(64) float lanes[Vec::kWidth];
  store(lanes, values);
  for (int offset = 0; offset < Vec::kWidth; ++offset) sums[offset] += lanes[offset];
}

// As weigh() of weigh_tile.h. Of products, which still lack their factors, it finds the largest scores too; with kKeep
// the weights stay in the tile.
template <class Weight, TileHolds kHolds, bool kKeep>
static void weigh_pairs(RowState& state, const KeyTile& keys, float* tile, uint32_t* pairs, float* tile_largest) {
  constexpr bool kTrackLargest = kHolds == TileHolds::kProducts;
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
    Vec sum = Vec::broadcast(0.0f), rounded_sum = sum, largest = Vec::broadcast(-INFINITY);
    map_to_pairs<Weight, kHolds>(state, keys, tile, lane, pairs, rounded_sum, [&](Vec x, int key) {
      if (kTrackLargest) largest = maximum(x, largest);
      const Vec weight = Weight::forward_short(x);
      if (kKeep) store(tile + key * state.rows.lanes + lane, weight);
      sum = sum + weight;
      return weight;
    });
    add_lanes(state.normalizer + lane, sum);
    add_lanes(state.rounded_sum + lane, rounded_sum);
    if (!kTrackLargest) continue;
    largest = largest * Vec::broadcast(core::kLn2);
    store(tile_largest + lane, largest);
    store(state.largest + lane, maximum(largest, Vec::load(state.largest + lane)));
  }
}

// As reweigh() of weigh_tile.h. `responses`, where they are saved, receive (r / m)^(p - 1) as they are.
template <class Weight, TileHolds kHolds, bool kSaves>
static void reweigh_pairs(const AttentionProblem& problem, RowState& state, const KeyTile& keys, const float* tile,
                          uint32_t* pairs, float* responses) {
  const Vec zeros = Vec::broadcast(0.0f);
  const float power = problem.reweight.power;
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
    const Vec mean = Vec::load(state.mean + lane);
    const Vec inverse_peak = Vec::load(state.inverse_peak + lane);
    const Mask flat = equal(Vec::load(state.flat + lane), Vec::broadcast(1.0f));
    Vec sum = zeros, rounded_sum = zeros;
    map_to_pairs<Weight, kHolds>(state, keys, tile, lane, pairs, rounded_sum, [&](Vec x, int key) {
      const Vec weight = kHolds == TileHolds::kWeights ? x : Weight::forward_short(x);
      const Vec excess = maximum(zeros, weight - mean) * inverse_peak;
      const Vec response = response_of(excess, power);
      if (kSaves) store(responses + key * state.rows.lanes + lane, response);
      const Vec sharp = select(flat, weight, response * excess);
      sum = sum + sharp;
      return sharp;
    });
    add_lanes(state.weight_sum + lane, sum);
    add_lanes(state.rounded_sum + lane, rounded_sum);
  }
}

// Responses (keys, lanes) to pairs. Their sum is that of the rounded ones, as their product with V is.
[[maybe_unused]] static void round_responses(RowState& state, int keys, const float* responses, uint32_t* pairs) {
  const int64_t lanes = state.rows.lanes, depth = core::round_up(keys, kPairDepth);
  round_to_pairs(responses, keys, depth, lanes, pairs);
  for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t row = 0; row < depth / 2; ++row) sum = add_pairs(sum, load_pairs(pairs + row * lanes + lane));
    add_lanes(state.response + lane, sum);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
