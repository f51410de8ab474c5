// From scores to weights, tile by tile, and what a tile of query rows gathers on the way (MATH.md sections 1 and 2).
#pragma once

#include <cmath>

#include "core/weights.h"
#include "cpu/score_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

// What a tile of rows has gathered so far.
struct RowState {
  RowTile rows;
  float* transposed_queries;  // (D, lanes)
  uint32_t* query_pairs;      // (padded D / 2, lanes), for products of pairs
  float* values;              // (lanes, padded Dv): weighted values of finished chunks
  float* chunk_values;        // the same of the current chunk; with products of pairs (padded Dv, lanes)
  float* response_values;     // U, likewise, when saved
  float* chunk_response_values;
  alignas(64) float shift[kRowTile];        // softmax: running maximum; softplus: 0
  alignas(64) float largest[kRowTile];      // largest score so far
  alignas(64) float chunk_decay[kRowTile];  // what the shift's growth within the chunk does to finished chunks
  alignas(64) float mean[kRowTile];
  alignas(64) float inverse_peak[kRowTile];
  alignas(64) float flat[kRowTile];   // 1 where the row is flat
  alignas(64) float least[kRowTile];  // re-weighting: weights below it do not count
  bool done[kRowTile];                // the row is written, and finite
  double normalizer[kRowTile];
  double rounded_sum[kRowTile];  // of the weights as rounded for products of pairs: what the output is divided by
  double weight_sum[kRowTile];
  double response[kRowTile];
};

// Softmax weights are taken relative to a shift that may lag behind the row's largest score by this much: weights of up
// to e^5.5 = 245 lose nothing, and after its first keys a row is hardly ever rescaled.
constexpr float kShiftSlack = 5.5f;

[[maybe_unused]] static void track_largest(RowState& state, const float* tile_largest) {
  for (int lane = 0; lane < state.rows.lanes; ++lane)
    state.largest[lane] = tile_largest[lane] > state.largest[lane] ? tile_largest[lane] : state.largest[lane];
}

// Whether a row's largest score in a tile exceeds its shift by more than the slack.
[[maybe_unused]] static bool shift_rises(const RowState& state, const float* tile_largest) {
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth)
    if (any(less(Vec::load(state.shift + lane) + Vec::broadcast(kShiftSlack), Vec::load(tile_largest + lane))))
      return true;
  return false;
}

// Softmax, where shift_rises(): a much larger maximum rescales what the row has gathered.
[[maybe_unused]] static void raise_shift(RowState& state, const float* tile_largest, int64_t padded_width, bool pairs) {
  alignas(64) float decays[kRowTile];
  bool gathered = false;
  for (int lane = 0; lane < state.rows.lanes; ++lane) {
    const float before = state.shift[lane];
    const float after = tile_largest[lane];
    decays[lane] = 1.0f;
    if (!(after > before + kShiftSlack)) continue;
    state.shift[lane] = after;
    if (before == -INFINITY) continue;  // the row has gathered nothing yet
    const float decay = std::exp(before - after);
    decays[lane] = decay;
    gathered = true;
    state.normalizer[lane] *= decay;
    state.rounded_sum[lane] *= decay;
    state.chunk_decay[lane] *= decay;
    if (!pairs) scale_row(state.chunk_values + lane * padded_width, decay, padded_width);
  }
  if (!pairs || !gathered) return;
  for (int64_t column = 0; column < padded_width; ++column)
    for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
      float* entry = state.chunk_values + column * state.rows.lanes + lane;
      store(entry, Vec::load(entry) * Vec::load(decays + lane));
    }
}

// Scores to weights, in place; adds the tile's row sums to the normaliser.
template <class Weight, bool kStore>
static void weigh(RowState& state, int keys, float* tile) {
  const int lanes = state.rows.lanes;
  for (int lane = 0; lane < lanes; lane += Vec::kWidth) {
    Vec shift = Vec::load(state.shift + lane);
    shift = select(equal(shift, Vec::broadcast(-INFINITY)), Vec::broadcast(0.0f), shift);
    Vec sum = Vec::broadcast(0.0f);
    for (int j = 0; j < keys; ++j) {
      float* entry = tile + j * lanes + lane;
      const Vec score = Vec::load(entry);
      const Vec weight = Weight::forward(Weight::kShifted ? score - shift : score);
      if (kStore) store(entry, weight);
      sum = sum + weight;
    }
    alignas(64) float sums[Vec::kWidth];
    store(sums, sum);
    for (int offset = 0; offset < Vec::kWidth; ++offset) state.normalizer[lane + offset] += sums[offset];
  }
}

// Scores or weights of the first sweep to re-weighted ones w = (r / m)^p in `weights`, and (r / m)^(p - 1) in
// `responses` where they are saved.
template <class Weight, TileHolds kHolds>
static void reweigh(const AttentionProblem& problem, RowState& state, int keys, const float* tile, float* weights,
                    float* responses) {
  const int lanes = state.rows.lanes;
  const Vec zeros = Vec::broadcast(0.0f);
  const float power = problem.reweight.power;
  for (int lane = 0; lane < lanes; lane += Vec::kWidth) {
    Vec shift = Vec::load(state.shift + lane);
    shift = select(equal(shift, Vec::broadcast(-INFINITY)), zeros, shift);
    const Vec mean = Vec::load(state.mean + lane);
    const Vec inverse_peak = Vec::load(state.inverse_peak + lane);
    const Mask flat = equal(Vec::load(state.flat + lane), Vec::broadcast(1.0f));
    Vec sum = zeros;
    Vec response_sum = zeros;
    for (int j = 0; j < keys; ++j) {
      const Vec entry = Vec::load(tile + j * lanes + lane);
      const Vec weight =
          kHolds == TileHolds::kWeights ? entry : Weight::forward(Weight::kShifted ? entry - shift : entry);
      const Vec excess = maximum(zeros, weight - mean) * inverse_peak;
      const Vec response = response_of(excess, power);
      if (responses != nullptr) {
        response_sum = response_sum + response;
        store(responses + j * lanes + lane, response);
      }
      Vec sharp = response * excess;  // the same bits with and without saving
      sharp = select(flat, weight, sharp);
      sum = sum + sharp;
      store(weights + j * lanes + lane, sharp);
    }
    alignas(64) float sums[Vec::kWidth];
    alignas(64) float response_sums[Vec::kWidth];
    store(sums, sum);
    store(response_sums, response_sum);
    for (int offset = 0; offset < Vec::kWidth; ++offset) {
      state.weight_sum[lane + offset] += sums[offset];
      state.response[lane + offset] += response_sums[offset];
    }
  }
}

// What re-weighting knows of a row between its two sweeps.
struct Peak {
  float mean, inverse_peak, peak;
  bool flat;
};

// By the flat-row rule of section 2, from a row's largest score and its normaliser relative to `shift`. `with_short`
// says by which polynomials the weights were made: in a row that is nearly flat the peak must have the same error as
// they.
template <class Weight>
static Peak find_peak(const AttentionProblem& problem, float visible, float shift, float largest, double normalizer,
                      bool with_short) {
  const bool exempt = visible <= static_cast<float>(problem.reweight.exempt_rows) || problem.reweight.offset == 0.0f;
  const Vec highest = Vec::broadcast(largest - (Weight::kShifted ? shift : 0.0f));
  const Vec top = with_short ? Weight::forward_short(highest * Vec::broadcast(core::kLog2E)) : Weight::forward(highest);
  const float largest_weight = sum_of_lanes(top) * (1.0f / Vec::kWidth);
  const float mean =
      exempt || visible == 0.0f ? 0.0f : static_cast<float>(problem.reweight.offset * normalizer / visible);
  const float peak = largest_weight - mean;
  // A NaN that no largest score has kept is in the normaliser: no tile of such a row may be left out.
  const bool flat =
      (!exempt && !(peak > core::kFlatRow * largest_weight)) || !(peak > 0.0f) || normalizer != normalizer;
  return {mean, flat ? 0.0f : 1.0f / peak, peak, flat};
}

// The bound of tile skipping (section 2): all keys whose weights stay below it hold less than a share tau of the row.
// Where gradients are wanted the slower of the two sums decides, that of the responses.
[[maybe_unused]] static float least_weight(const AttentionProblem& problem, float visible, const Peak& peak) {
  if (visible == 0.0f) return INFINITY;
  if (peak.flat) return -INFINITY;
  const float tau = problem.dtype == DType::kFloat32   ? 0x1p-24f
                    : problem.dtype == DType::kFloat16 ? 0x1p-14f
                                                       : 0x1p-12f;
  const float exponent = problem.saved_values != nullptr ? problem.reweight.power - 1.0f : problem.reweight.power;
  return peak.mean + peak.peak * std::pow(tau / visible, 1.0f / exponent);
}

// Whether any row has a weight in a tile that counts, by the largest scores of the tile. NaN counts.
template <class Weight>
static bool tile_counts(const RowState& state, const float* tile_largest) {
  for (int lane = 0; lane < state.rows.lanes; lane += Vec::kWidth) {
    Vec shift = Vec::load(state.shift + lane);
    shift = select(equal(shift, Vec::broadcast(-INFINITY)), Vec::broadcast(0.0f), shift);
    const Vec largest = Vec::load(tile_largest + lane);
    const Vec weight = Weight::forward(Weight::kShifted ? largest - shift : largest);
    alignas(64) float counts[Vec::kWidth];
    store(counts, select(less(weight, Vec::load(state.least + lane)), Vec::broadcast(0.0f), Vec::broadcast(1.0f)));
    for (int offset = 0; offset < Vec::kWidth; ++offset)
      if (counts[offset] != 0.0f) return true;
  }
  return false;
}

template <class Weight>
static void find_peaks(const AttentionProblem& problem, RowState& state, bool with_short) {
  for (int lane = 0; lane < state.rows.lanes; ++lane) {
    const Peak peak = find_peak<Weight>(problem, state.rows.visible_keys[lane], state.shift[lane], state.largest[lane],
                                        state.normalizer[lane], with_short);
    state.mean[lane] = peak.mean;
    state.inverse_peak[lane] = peak.inverse_peak;
    state.flat[lane] = peak.flat ? 1.0f : 0.0f;
    state.least[lane] = lane < state.rows.rows ? least_weight(problem, state.rows.visible_keys[lane], peak) : INFINITY;
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
