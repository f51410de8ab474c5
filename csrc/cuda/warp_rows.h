// What a warp gathers for its 16 rows while it walks the keys: from products to scores, from scores to weights, sums.
#pragma once

#include "cuda/decode_rows.h"
#include "cuda/warp_tile.h"

namespace sightline::cuda {

// Per lane, of the rows g and g + 8. The sums of weights are of the lane's own keys, everything else is of the row.
template <int kWidth>
struct WarpRows {
  float largest[2], reference[2];
  core::CompensatedSum weights[2];
  float divisor[2];
  ValueSums<kWidth> values;
};

template <int kWidth>
SIGHTLINE_DEVICE void start_rows(WarpRows<kWidth>& state, const float (&largest)[2], WeightFunction function) {
  for (int r = 0; r < 2; ++r) {
    state.largest[r] = largest[r];
    state.reference[r] = reference_of(function, largest[r]);
    state.weights[r] = {0.0f, 0.0f};
    state.divisor[r] = 0.0f;
  }
  state.values = {};
}

// Whether the lane's keys are to be read at all: inside the block's range, and on in key_mask.
SIGHTLINE_DEVICE OfKeys<bool> live_keys(const AttentionProblem& problem, int64_t batch, const Lane& lane, int32_t tile,
                                        int32_t end) {
  OfKeys<bool> live;
  SIGHTLINE_UNROLL
  for (int n = 0; n < 2; ++n) {
    SIGHTLINE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t key = tile + key_in_tile(lane, n, h);
      live.of[n][h] = key < end;
      if (problem.key_mask != nullptr && key < end)
        live.of[n][h] = problem.key_mask[batch * problem.key_mask_strides[0] + key * problem.key_mask_strides[1]] != 0;
    }
  }
  return live;
}

// Products to scores, in place. A key that a row does not see has score -inf, for which every weight function is 0.
SIGHTLINE_DEVICE void finish_scores(const AttentionProblem& problem, const RowInfo* rows, const Lane& lane,
                                    int32_t tile, const OfKeys<bool>& live, const OfKeys<float>& inverse_norms,
                                    ScoreTile& scores) {
  SIGHTLINE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const RowInfo& row = rows[lane.g + r * 8];
    const float row_factor = row.factor;
    const int32_t first = row.first, last = row.last;
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int32_t key = tile + key_in_tile(lane, n, h);
        float& entry = scores.entries[n][r * 2 + h];
        float score = entry * (problem.normalize_qk ? row_factor * inverse_norms.of[n][h] : row_factor);
        if (problem.alibi_slopes != nullptr) score -= row.slope * fabsf(static_cast<float>(row.position - key));
        if (problem.softcap > 0.0f)
          score = problem.softcap * core::tanh(core::Scalar{score * (1.0f / problem.softcap)}).value;
        entry = key >= first && key <= last && live.of[n][h] ? score : -INFINITY;
      }
    }
  }
}

// A larger score may move a row's reference, and its sums with it.
template <int kWidth>
SIGHTLINE_DEVICE void raise_references(WeightFunction function, const ScoreTile& scores, WarpRows<kWidth>& state) {
  float before[2];
  SIGHTLINE_UNROLL
  for (int r = 0; r < 2; ++r) {
    float top = state.largest[r];
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) top = fmaxf(top, fmaxf(scores.entries[n][r * 2], scores.entries[n][r * 2 + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    state.largest[r] = fmaxf(top, shuffle_xor(top, 2));
    before[r] = state.reference[r];
    state.reference[r] = reference_of(function, state.largest[r]);
  }
  if (!any_in_warp(before[0] != state.reference[0] || before[1] != state.reference[1])) return;
  SIGHTLINE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float change = change_of_reference(function, before[r], state.reference[r]);
    state.weights[r] = core::scaled(state.weights[r], change);
    state.divisor[r] *= change;
    SIGHTLINE_UNROLL
    for (int set = 0; set < ValueSums<kWidth>::kSets; ++set) {
      SIGHTLINE_UNROLL
      for (int e = 0; e < 8; ++e) {
        SIGHTLINE_UNROLL
        for (int entry = r * 2; entry < r * 2 + 2; ++entry)
          state.values.sums[set][e][entry] = rescaled(state.values.sums[set][e][entry], change);
      }
    }
  }
}

// Scores to weights, in place; with `peaks` to re-weighted ones. Adds them to the rows' sums.
template <class Weight, int kWidth>
SIGHTLINE_DEVICE void weigh(const ReweightOptions& options, const RowPeak* peaks, const Lane& lane, ScoreTile& scores,
                            WarpRows<kWidth>& state) {
  SIGHTLINE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float operand = Relative<Weight>::operand(state.reference[r]);
    RowPeak peak{};
    if (peaks != nullptr) peak = peaks[lane.g + r * 8];
    float sum = 0.0f;
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float& entry = scores.entries[n][r * 2 + h];
        entry = Relative<Weight>::weight(entry, operand);
        if (peaks != nullptr) entry = reweighted(options, peak, entry);
        sum += entry;
      }
    }
    core::add(state.weights[r], sum);
  }
}

template <int kWidth>
SIGHTLINE_DEVICE void add_divisors(const ScoreTile& weights, WarpRows<kWidth>& state) {
  SIGHTLINE_UNROLL
  for (int r = 0; r < 2; ++r)
    state.divisor[r] += (weights.entries[0][r * 2] + weights.entries[0][r * 2 + 1]) +
                        (weights.entries[1][r * 2] + weights.entries[1][r * 2 + 1]);
}

template <int kWidth>
SIGHTLINE_DEVICE bool all_finite(const WarpRows<kWidth>& state) {
  float probe = 0.0f;  // zero times anything finite is zero
  SIGHTLINE_UNROLL
  for (int set = 0; set < ValueSums<kWidth>::kSets; ++set) {
    SIGHTLINE_UNROLL
    for (int e = 0; e < 8; ++e) {
      SIGHTLINE_UNROLL
      for (int entry = 0; entry < 4; ++entry) probe = fmaf(state.values.sums[set][e][entry], 0.0f, probe);
    }
  }
  return probe == 0.0f;
}

// The infinities and NaN of V, which the products left out, to the rows that give their keys a weight other than 0.
template <class T, int kWidth>
SIGHTLINE_DEVICE void add_non_finite_values(const HeadRows& values, const Lane& lane, int32_t tile,
                                            const OfKeys<bool>& live, const ScoreTile& weights,
                                            WarpRows<kWidth>& state) {
  SIGHTLINE_UNROLL_BY(1)
  for (int key = 0; key < kKeyTile; ++key) {
    const int owner = lane.g * 4 + key % 8 / 2;
    const bool upper = key >= 8, odd = key % 2 != 0;
    const auto entry = [&](int r) {
      const float even_weight = upper ? weights.entries[1][r * 2] : weights.entries[0][r * 2];
      const float odd_weight = upper ? weights.entries[1][r * 2 + 1] : weights.entries[0][r * 2 + 1];
      return odd ? odd_weight : even_weight;
    };
    const float row_weights[2] = {shuffle(entry(0), owner), shuffle(entry(1), owner)};
    const bool own_live = upper ? (odd ? live.of[1][1] : live.of[1][0]) : (odd ? live.of[0][1] : live.of[0][0]);
    if (shuffle(own_live ? 1.0f : 0.0f, owner) == 0.0f) continue;
    const char* row = HeadRows::row(values, tile + key);
    SIGHTLINE_UNROLL
    for (int set = 0; set < ValueSums<kWidth>::kSets; ++set) {
      SIGHTLINE_UNROLL
      for (int e = 0; e < 8; ++e) {
        SIGHTLINE_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int column = set * kWidthStep + column_in_set(lane, h, e);
          const float value = column < values.width ? load_element<T>(row, column) : 0.0f;
          if (is_finite(value)) continue;
          for (int r = 0; r < 2; ++r)
            if (row_weights[r] != 0.0f) state.values.sums[set][e][r * 2 + h] += row_weights[r] * value;
        }
      }
    }
  }
}

}  // namespace sightline::cuda
