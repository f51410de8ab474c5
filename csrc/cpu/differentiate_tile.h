// From scores to their gradients, tile by tile (the backward formulas of MATH.md sections 1 and 2).
#pragma once

#include <cmath>

#include "core/weights.h"
#include "cpu/score_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct RowGradients {
  alignas(64) float shift[kRowTile];
  alignas(64) float inverse_normalizer[kRowTile];
  alignas(64) float delta[kRowTile];         // <do, o>
  alignas(64) float log_gradient[kRowTile];  // g_i
  alignas(64) float mean[kRowTile];
  alignas(64) float inverse_peak[kRowTile];
  alignas(64) float inverse_weight_sum[kRowTile];
  alignas(64) float response_factor[kRowTile];  // p / (m S)
  alignas(64) float coupling[kRowTile];         // (O / n) E - g / Z, subtracted from every visible df
  alignas(64) float flat[kRowTile];
};

// What saved tensors say of a live row whose delta is set. `response_product` is <dO, U>, where rows are re-weighted.
[[maybe_unused]] static void set_row_gradient(const AttentionProblem& problem, const RowTile& rows, int lane,
                                              float response_product, float log_gradient, RowGradients& state) {
  const bool reweighted = problem.reweight.power > 0.0f;
  const int64_t row_index = (rows.batch * problem.heads + rows.head[lane]) * problem.queries + rows.query[lane];
  const float* saved = problem.saved_rows + row_index * (reweighted ? kSavedWidthReweight : kSavedWidthPlain);
  const float normalizer = saved[kSavedNormalizer];
  const bool empty = normalizer == 0.0f;
  // 0 is a row that sees no key; one whose weights have no finite sum has no gradient that is a number.
  const float quotient = 1.0f / normalizer;
  const float inverse = empty ? 0.0f : quotient == 0.0f ? NAN : quotient;
  state.shift[lane] = saved[kSavedShift];
  state.inverse_normalizer[lane] = inverse;
  state.log_gradient[lane] = empty ? 0.0f : log_gradient;
  state.flat[lane] = 1.0f;
  if (!reweighted || saved[kSavedWeightSum] == 0.0f || empty) return;
  const float peak = saved[kSavedPeak];
  const float visible = rows.visible_keys[lane];
  const float offset = visible <= static_cast<float>(problem.reweight.exempt_rows) ? 0.0f : problem.reweight.offset;
  const float row_sum =
      problem.reweight.power / peak * (response_product - state.delta[lane] * saved[kSavedResponse]);  // E_i
  state.flat[lane] = 0.0f;
  state.mean[lane] = saved[kSavedMean];
  state.inverse_peak[lane] = 1.0f / peak;
  state.inverse_weight_sum[lane] = 1.0f / saved[kSavedWeightSum];
  state.response_factor[lane] = problem.reweight.power / (peak * saved[kSavedWeightSum]);
  state.coupling[lane] = offset / visible * row_sum - state.log_gradient[lane] * inverse;
}

SIGHTLINE_INLINE bool is_finite(const RowGradients& state, int lane) {
  const float entries[] = {state.shift[lane],
                           state.inverse_normalizer[lane],
                           state.delta[lane],
                           state.log_gradient[lane],
                           state.mean[lane],
                           state.inverse_peak[lane],
                           state.response_factor[lane],
                           state.coupling[lane],
                           state.inverse_weight_sum[lane]};
  return is_finite(entries, sizeof entries / sizeof entries[0]);
}

// Scores become weights (for dV), the products <do, v> score gradients (for dK and dQ), both in place.
template <class Weight, bool kReweight>
static void differentiate(const AttentionProblem& problem, const RowTile& rows, const RowGradients& state,
                          const KeyTile& keys, float* scores, float* score_gradients) {
  const Vec zeros = Vec::broadcast(0.0f);
  const Vec ones = Vec::broadcast(1.0f);
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  const float power = problem.reweight.power;
  for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
    const Vec shift = Vec::load(state.shift + lane);
    const Vec inverse_normalizer = Vec::load(state.inverse_normalizer + lane);
    const Vec delta = Vec::load(state.delta + lane);
    const Vec log_gradient = Vec::load(state.log_gradient + lane);
    const UintVec row_key = UintVec::load(rows.dropout_key + lane);
    const Vec mean = Vec::load(state.mean + lane);
    const Vec inverse_peak = Vec::load(state.inverse_peak + lane);
    const Vec inverse_weight_sum = Vec::load(state.inverse_weight_sum + lane);
    const Vec response_factor = Vec::load(state.response_factor + lane);
    const Vec coupling = Vec::load(state.coupling + lane);
    const Mask flat = equal(Vec::load(state.flat + lane), ones);
    for (int j = 0; j < keys.count; ++j) {
      const int64_t index = j * rows.lanes + lane;
      const Vec score = Vec::load(scores + index);
      Vec keep = ones;
      if (problem.dropout)
        keep = dropout_factor(problem, row_key, core::dropout_key_key(static_cast<uint32_t>(keys.first + j)));
      // What has no weight has no gradient either: its value may be NaN.
      const Vec value_product = select(equal(keep, zeros), zeros, Vec::load(score_gradients + index) * keep);
      Vec slope;
      const Vec weight = Weight::forward_and_derivative(Weight::kShifted ? score - shift : score, slope);
      Vec attention = weight * inverse_normalizer;
      Vec gradient = (value_product - delta + log_gradient) * inverse_normalizer;
      if (kReweight) {
        const Vec excess = maximum(zeros, weight - mean) * inverse_peak;
        const Vec response = response_of(excess, power);
        const Vec sharp = select(equal(response, zeros), zeros, response * response_factor * (value_product - delta));
        const Vec sharp_gradient = sharp - coupling;
        attention = select(flat, attention, response * excess * inverse_weight_sum);
        gradient = select(flat, gradient, sharp_gradient);
      }
      gradient = select(equal(slope, zeros), zeros, gradient * slope);
      if (problem.softcap > 0.0f) {
        const Vec ratio = score * Vec::broadcast(1.0f / problem.softcap);
        gradient = gradient * (ones - ratio * ratio);
      }
      const Mask invisible = equal(score, minus_infinity);
      store(scores + index, select(invisible, zeros, attention * keep));
      store(score_gradients + index, select(invisible, zeros, gradient));
    }
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
