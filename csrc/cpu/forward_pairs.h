// The forward pass on products of bfloat16 pairs (pair_product.h): a tile of products becomes pairs of weights, and a
// few tiles of weights meet their values together.
#pragma once

#include <type_traits>

#include "cpu/forward_unit.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Tiles of weights whose products with the values are due, for one tile of rows.
template <int kParts>
class PairValues {
 public:
  PairValues(const AttentionProblem& problem, const AttentionForwardScratch& scratch, RowState& state)
      : scratch_(scratch), state_(state), saves_(problem.saved_values != nullptr) {}

  uint32_t* weights() const { return scratch_.weight_pairs + count_ * kParts * scratch_.weight_part; }
  uint32_t* responses() const { return scratch_.response_pairs + count_ * kParts * scratch_.weight_part; }

  // What weights() and, if they are saved, responses() hold goes with the values of this tile.
  void add(const KeyTile& keys) {
    const SplitRows columns{keys.value_columns, kKeyTile, scratch_.column_part};
    const int64_t depth = core::round_up(keys.count, kPairDepth), lanes = state_.rows.lanes;
    weighted_[count_] = {columns, {weights(), kPanelLanes, scratch_.weight_part, lanes}, depth};
    if (saves_) responded_[count_] = {columns, {responses(), kPanelLanes, scratch_.weight_part, lanes}, depth};
    ++count_;
  }

  void multiply() {
    if (count_ == 0) return;
    multiply(weighted_, state_.chunk_values);
    if (saves_) multiply(responded_, state_.chunk_response_values);
    count_ = 0;
  }

 private:
  void multiply(const TileFactors* factors, float* sums) const {
    const int64_t columns = scratch_.padded_width, lanes = state_.rows.lanes;
    pair_products<kParts, kParts, true>(factors, count_, sums, lanes, columns, lanes);
  }

  const AttentionForwardScratch& scratch_;
  RowState& state_;
  TileFactors weighted_[kPairKeyTiles], responded_[kPairKeyTiles];
  int count_ = 0;
  bool saves_;
};

// Scores or products to pairs of weights, or in the first of two sweeps to what it gathers.
template <class Weight, bool kReweight, bool kFirstSweep, int kParts, TileHolds kHolds, bool kMasked, bool kFactors>
static void weigh_pair_tile(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                            const KeyTile& keys, const TileVisibility& visible, bool keeps, float* tile,
                            float* tile_largest, RowState& state, const PairValues<kParts>& due) {
  const int64_t part = scratch.weight_part;
  if constexpr (!kReweight) {
    weigh_pairs<Weight, kParts, kHolds, kMasked, kFactors, false>(state, keys, visible, tile, due.weights(), part,
                                                                  tile_largest);
  } else if constexpr (kFirstSweep) {
    if (keeps)
      weigh_pairs<Weight, kParts, kHolds, kMasked, true, true>(state, keys, visible, tile, nullptr, part, tile_largest);
    else
      weigh_pairs<Weight, kParts, kHolds, kMasked, true, false>(state, keys, visible, tile, nullptr, part,
                                                                tile_largest);
  } else if (problem.saved_values == nullptr) {
    reweigh_pairs<Weight, kParts, kHolds, kMasked, false>(problem, state, keys, visible, tile, due.weights(), part,
                                                          nullptr);
  } else {
    reweigh_pairs<Weight, kParts, kHolds, kMasked, true>(problem, state, keys, visible, tile, due.weights(), part,
                                                         scratch.responses);
    round_responses<kParts>(state, keys.count, scratch.responses, due.responses(), part);
  }
}

// A new shift rescales what has been gathered, not what is still due.
template <int kParts>
static void raise_shift_of_pairs(RowState& state, const float* tile_largest, int64_t padded_width,
                                 PairValues<kParts>& due) {
  if (!shift_rises(state, tile_largest)) return;
  due.multiply();
  raise_shift(state, tile_largest, padded_width, true);
}

// Products that lack nothing but their factors to pairs of weights.
template <class Weight, bool kReweight, bool kFirstSweep, int kParts, TileHolds kHolds, bool kMasked, bool kFactors>
static void weigh_product_tile(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                               const KeyTile& keys, const TileVisibility& visible, bool keeps, float* tile,
                               float* tile_largest, RowState& state, PairValues<kParts>& due) {
  if (Weight::kShifted) {
    find_largest_scores<kMasked, kFactors>(state.rows, keys, visible, tile, tile_largest);
    track_largest(state, tile_largest);
    raise_shift_of_pairs(state, tile_largest, scratch.padded_width, due);
  }
  weigh_pair_tile<Weight, kReweight, kFirstSweep, kParts, kHolds, kMasked, kFactors>(
      problem, scratch, keys, visible, keeps, tile, tile_largest, state, due);
}

template <class Weight, bool kReweight, bool kFirstSweep, int kParts>
static void find_pair_weights(const AttentionProblem& problem, const AttentionForwardScratch& scratch,
                              const KeyTile& keys, bool keeps, float* tile, float* tile_largest, RowState& state,
                              PairValues<kParts>& due) {
  TileVisibility visible;
  if constexpr (kReweight && !kFirstSweep && !Weight::kShifted)
    if (keeps)
      return weigh_pair_tile<Weight, kReweight, kFirstSweep, kParts, TileHolds::kWeights, false, true>(
          problem, scratch, keys, visible, keeps, tile, tile_largest, state, due);
  const int64_t lanes = state.rows.lanes;
  const TileFactors factors{{keys.key_bits, keys.key_bits_stride, keys.key_bits_part},
                            {state.query_pairs, kPanelLanes, scratch.query_part, lanes},
                            scratch.padded_depth};
  pair_products<kParts, kParts, false, true>(&factors, 1, tile, lanes, core::round_up(keys.count, kPairRows), lanes);
  // A peak is found from the largest score: under a shift, weights must come from scores as it does (find_peak()).
  constexpr bool kFromScores = kReweight && Weight::kShifted;
  // The same where ALiBi decides how much a weight is that the backward pass finds again from its score and the shift.
  const bool slopes_under_shift = Weight::kShifted && problem.alibi_slopes != nullptr;
  if (kFromScores || slopes_under_shift || has_bias(problem) || problem.softcap > 0.0f) {
    finish_tile(problem, state.rows, keys, scratch.bias, tile, tile_largest);
    if (!kReweight || kFirstSweep) {
      track_largest(state, tile_largest);
      if (Weight::kShifted) raise_shift_of_pairs(state, tile_largest, scratch.padded_width, due);
    }
    return weigh_pair_tile<Weight, kReweight, kFirstSweep, kParts, TileHolds::kScores, false, true>(
        problem, scratch, keys, visible, keeps, tile, tile_largest, state, due);
  }
  if constexpr (!kFromScores) {
    const auto weigh = [&](auto holds, auto masked, auto factors) {
      weigh_product_tile<Weight, kReweight, kFirstSweep, kParts, holds, masked, factors>(
          problem, scratch, keys, visible, keeps, tile, tile_largest, state, due);
    };
    const auto weigh_masked = [&](auto holds) {
      if (!has_masked_entries(problem, state.rows, keys)) return false;
      find_visible(problem, state.rows, keys.first, keys.count, keys.takes_part, visible);
      if constexpr (!kReweight && holds == TileHolds::kProducts)
        if (!problem.normalize_qk) {
          weigh(holds, std::true_type(), std::false_type());
          return true;
        }
      weigh(holds, std::true_type(), std::true_type());
      return true;
    };
    constexpr std::integral_constant<TileHolds, TileHolds::kProducts> products;
    [[maybe_unused]] constexpr std::integral_constant<TileHolds, TileHolds::kSlopedProducts> sloped;
    if constexpr (!Weight::kShifted)
      if (problem.alibi_slopes != nullptr) {
        if (!weigh_masked(sloped)) weigh(sloped, std::false_type(), std::true_type());
        return;
      }
    if (weigh_masked(products)) return;
    // Where keys are re-weighted, their factors always take part, though they may be 1.
    if (kReweight || problem.normalize_qk) return weigh(products, std::false_type(), std::true_type());
    if constexpr (!kReweight) weigh(products, std::false_type(), std::false_type());
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
