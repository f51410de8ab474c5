// From scores to bfloat16 weights in pairs, for products of pairs (pair_product.h): weigh_tile.h's work in one pass,
// with polynomials as exact as the rounding needs.
#pragma once

#include "cpu/pair_product.h"
#include "cpu/weigh_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

// log2(e) (score - shift) of the product of a row and a key. Every tile of a row takes it from here, whether masked or
// not: a row's bits must not depend on the tiles in which it is masked.
// kFactors: keys have factors, which are 1 otherwise. kSloped: ALiBi lowers the score, which has no shift.
template <class Weight, bool kFactors, bool kSloped>
struct ExponentOfProduct {
  static_assert(!kSloped || !Weight::kShifted);
  Vec row_factor;
  Vec minus_shift;
  Vec minus_slope;
  IntVec position;

  ExponentOfProduct(const RowState& state, int lane)
      : row_factor(Vec::load(state.rows.factor + lane) * Vec::broadcast(core::kLog2E)) {
    if (kSloped) {
      minus_slope = Vec::load(state.rows.slope + lane) * Vec::broadcast(-core::kLog2E);
      position = IntVec::load(state.rows.position + lane);
    }
    if (!Weight::kShifted) return;
    const Vec shift = Vec::load(state.shift + lane), zeros = Vec::broadcast(0.0f);
    minus_shift = zeros - select(equal(shift, Vec::broadcast(-INFINITY)), zeros, shift) * Vec::broadcast(core::kLog2E);
  }

  __attribute__((always_inline)) Vec operator()(Vec product, float key_factor, int32_t key) const {
    const Vec factor = kFactors ? row_factor * Vec::broadcast(key_factor) : row_factor;
    if (kSloped) return fma(minus_slope, absolute(to_float(position - IntVec::broadcast(key))), product * factor);
    return Weight::kShifted ? fma(product, factor, minus_shift) : product * factor;
  }
};

// Per 16 lanes of a tile of `keys.count` keys, two keys at a time: x = log2(e) (score - shift) to `weigh(x, key)`, and
// pairs of what that returns to `pairs`, in parts `part` apart, unless it is null, in a depth padded with zeros. What
// is not visible is taken from products here, and from scores before.
template <class Weight, int kParts, TileHolds kHolds, bool kMasked, bool kFactors, class Weigh>
SIGHTLINE_INLINE void map_to_pairs(const RowState& state, const KeyTile& keys, const TileVisibility& visible,
                                   const float* tile, int lane, uint32_t* pairs, int64_t part, Vec& rounded_sum,
                                   Weigh weigh) {
  keep_tile_unit_awake();
  const int64_t lanes = state.rows.lanes;
  const Vec log2_e = Vec::broadcast(core::kLog2E), zeros = Vec::broadcast(0.0f);
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  const ExponentOfProduct<Weight, kFactors, kHolds == TileHolds::kSlopedProducts> exponent_of(state, lane);
  const auto first_key = static_cast<int32_t>(keys.first);
  Vec shift = Vec::load(state.shift + lane);
  shift = select(equal(shift, minus_infinity), zeros, shift);
  const auto weight_at = [&](int key) SIGHTLINE_INLINE_LAMBDA {
    const Vec entry = Vec::load(tile + key * lanes + lane);
    if (kHolds == TileHolds::kWeights) return weigh(entry, key);
    // In this order: log2(e) times a score may overflow.
    if (kHolds == TileHolds::kScores) return weigh((Weight::kShifted ? entry - shift : entry) * log2_e, key);
    const Vec x = exponent_of(entry, keys.factor[key], first_key + key);
    if (!kMasked) return weigh(x, key);
    return weigh(select(mask_of_bits(visible.lanes[key], lane), x, minus_infinity), key);
  };
  const auto keep = [&](int key, Vec low, Vec high) SIGHTLINE_INLINE_LAMBDA {
    if (pairs == nullptr) return;
    uint32_t* to = pairs + key / 2 * lanes + lane;
    for_each_part<kParts>([&](int index, auto last) SIGHTLINE_INLINE_LAMBDA {
      const Pairs rounded = split_pairs<last>(low, high);
      if (kParts == 1) rounded_sum = add_pairs(rounded_sum, rounded);
      store(to + index * part, rounded);
    });
  };
  int key = 0;
  for (; key + 2 <= keys.count; key += 2) {
    const Vec low = weight_at(key);
    keep(key, low, weight_at(key + 1));
  }
  if (key < keys.count) {
    keep(key, weight_at(key), zeros);
    key += 2;
  }
  for (; key < core::round_up(keys.count, kPairDepth); key += 2) keep(key, zeros, zeros);
}

// The largest over `keys` of what score_of(key) gives; keys are taken in turns by a few sums that do not wait for each
// other.
template <class ScoreOf>
SIGHTLINE_INLINE Vec largest_of_keys(int keys, ScoreOf score_of) {
  constexpr int kChains = 4;
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  Vec top[kChains] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  int key = 0;
  for (; key + kChains <= keys; key += kChains)
    for (int chain = 0; chain < kChains; ++chain) top[chain] = maximum(score_of(key + chain), top[chain]);
  for (; key < keys; ++key) top[0] = maximum(score_of(key), top[0]);
  return maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
}

// The largest score of each row of a tile of products, for a shift that must be known before the first weight.
template <bool kMasked, bool kFactors>
static void find_largest_scores(const RowTile& rows, const KeyTile& keys, const TileVisibility& visible,
                                const float* tile, float* largest) {
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
    const Vec row_factor = Vec::load(rows.factor + lane);
    const auto among_visible = [&](Vec entry, int key) SIGHTLINE_INLINE_LAMBDA {
      return kMasked ? select(mask_of_bits(visible.lanes[key], lane), entry, minus_infinity) : entry;
    };
    const auto product_of = [&](int key) SIGHTLINE_INLINE_LAMBDA { return Vec::load(tile + key * rows.lanes + lane); };
    // A factor of 0 or NaN would make NaN of what is not visible.
    const Mask keeps_order = less(Vec::broadcast(0.0f), row_factor);
    if (!kFactors && bits_of(keeps_order) == bits_of(equal(minus_infinity, minus_infinity))) {
      // Rounding keeps the order: the score of the largest product is the largest.
      const auto entry_of = [&](int key) SIGHTLINE_INLINE_LAMBDA { return among_visible(product_of(key), key); };
      store(largest + lane, largest_of_keys(keys.count, entry_of) * row_factor);
      continue;
    }
    const auto score_of = [&](int key) SIGHTLINE_INLINE_LAMBDA {
      return among_visible(product_of(key) * (row_factor * Vec::broadcast(keys.factor[key])), key);
    };
    store(largest + lane, largest_of_keys(keys.count, score_of));
  }
}

SIGHTLINE_INLINE void add_lanes(double* sums, Vec values) {
  alignas(64) float lanes[Vec::kWidth];
  store(lanes, values);
  for (int offset = 0; offset < Vec::kWidth; ++offset) sums[offset] += lanes[offset];
}

// As weigh() of weigh_tile.h. Of products whose weights need no shift it finds the largest scores too; with kKeep the
// weights stay in the tile.
template <class Weight, int kParts, TileHolds kHolds, bool kMasked, bool kFactors, bool kKeep>
static void weigh_pairs(RowState& state, const KeyTile& keys, const TileVisibility& visible, float* tile,
                        uint32_t* pairs, int64_t part, float* tile_largest) {
  constexpr bool kTrackLargest = holds_products(kHolds) && !Weight::kShifted;
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
    Vec sum = Vec::broadcast(0.0f), rounded_sum = sum, largest = Vec::broadcast(-INFINITY);
    const auto weigh = [&](Vec x, int key) SIGHTLINE_INLINE_LAMBDA {
      if (kTrackLargest) largest = maximum(x, largest);
      const Vec weight = Weight::forward_short(x);
      if (kKeep) store(tile + key * state.rows.lanes + lane, weight);
      sum = sum + weight;
      return weight;
    };
    map_to_pairs<Weight, kParts, kHolds, kMasked, kFactors>(state, keys, visible, tile, lane, pairs, part, rounded_sum,
                                                            weigh);
    add_lanes(state.normalizer + lane, sum);
    if (kParts == 1) add_lanes(state.rounded_sum + lane, rounded_sum);
    if (!kTrackLargest) continue;
    largest = largest * Vec::broadcast(core::kLn2);
    store(tile_largest + lane, largest);
    store(state.largest + lane, maximum(largest, Vec::load(state.largest + lane)));
  }
}

// As reweigh() of weigh_tile.h. `responses`, where they are saved, receive (r / m)^(p - 1) as they are.
template <class Weight, int kParts, TileHolds kHolds, bool kMasked, bool kSaves>
static void reweigh_pairs(const AttentionProblem& problem, RowState& state, const KeyTile& keys,
                          const TileVisibility& visible, const float* tile, uint32_t* pairs, int64_t part,
                          float* responses) {
  const Vec zeros = Vec::broadcast(0.0f);
  const float power = problem.reweight.power;
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
    const Vec mean = Vec::load(state.mean + lane);
    const Vec inverse_peak = Vec::load(state.inverse_peak + lane);
    const Mask flat = equal(Vec::load(state.flat + lane), Vec::broadcast(1.0f));
    Vec sum = zeros, rounded_sum = zeros, response_sum = zeros;
    const auto weigh = [&](Vec x, int key) SIGHTLINE_INLINE_LAMBDA {
      const Vec weight = kHolds == TileHolds::kWeights ? x : Weight::forward_short(x);
      const Vec excess = maximum(zeros, weight - mean) * inverse_peak;
      const Vec response = response_of(excess, power);
      if (kSaves) {
        store(responses + key * state.rows.lanes + lane, response);
        response_sum = response_sum + response;
      }
      const Vec sharp = select(flat, weight, response * excess);
      sum = sum + sharp;
      return sharp;
    };
    map_to_pairs<Weight, kParts, kHolds, kMasked, true>(state, keys, visible, tile, lane, pairs, part, rounded_sum,
                                                        weigh);
    add_lanes(state.weight_sum + lane, sum);
    if (kParts == 1) add_lanes(state.rounded_sum + lane, rounded_sum);
    if (kParts > 1 && kSaves) add_lanes(state.response + lane, response_sum);
  }
}

// Responses (keys, lanes) to pairs. Where they are rounded, their sum is that of the rounded ones, as their product
// with V is.
template <int kParts>
static void round_responses(RowState& state, int keys, const float* responses, uint32_t* pairs, int64_t part) {
  const int64_t lanes = state.rows.lanes, depth = core::round_up(keys, kPairDepth);
  rows_to_pairs<kParts>(responses, keys, depth, lanes, pairs, part);
  if (kParts > 1) return;
  for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t row = 0; row < depth / 2; ++row) sum = add_pairs(sum, load_pairs(pairs + row * lanes + lane));
    add_lanes(state.response + lane, sum);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
