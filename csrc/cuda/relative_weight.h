// Weights relative to a reference that follows the row's largest score, for any weight function.
//
// Softmax subtracts the maximum so that exp does not overflow. A weight function without a shift needs no maximum in
// fp32, but its weights go into the product with V as 16-bit numbers, and fp16 ends at 65504 and at 6e-8: so they are
// divided by the power of two just below the weight of the largest score. Both follow from `largest` alone, so partial
// sums over keys can be merged.
#pragma once

#include <cmath>

#include "core/problem.h"
#include "core/scalar.h"
#include "core/weights.h"

namespace sightline::cuda {

template <class Weight, bool kShifted = Weight::kShifted>
struct Relative;

template <class Weight>
struct Relative<Weight, true> {
  SIGHTLINE_INLINE float reference(float largest) { return largest; }
  // What `weight` wants to know of a reference; before the first visible key there is none.
  SIGHTLINE_INLINE float operand(float reference) { return reference == -INFINITY ? 0.0f : reference; }
  SIGHTLINE_INLINE float weight(float score, float operand) {
    return Weight::forward(core::Scalar{score - operand}).value;
  }
  // The factor of sums when the reference moves.
  SIGHTLINE_INLINE float change(float before, float after) {
    return before == after ? 1.0f : Weight::forward(core::Scalar{before - after}).value;
  }
  SIGHTLINE_INLINE float log_of_unit(float reference) {
    return operand(reference) + static_cast<float>(Weight::kLogUnit);
  }
};

template <class Weight>
struct Relative<Weight, false> {
  SIGHTLINE_INLINE float reference(float largest) {
    core::Scalar mantissa;
    const float exponent = core::split_exponent(Weight::forward(core::Scalar{largest}), mantissa).value;
    return exponent < -126.0f ? -126.0f : exponent > 126.0f ? 126.0f : exponent;
  }
  SIGHTLINE_INLINE float operand(float reference) { return power_of_two(-reference); }
  SIGHTLINE_INLINE float weight(float score, float operand) {
    return Weight::forward(core::Scalar{score}).value * operand;
  }
  SIGHTLINE_INLINE float change(float before, float after) {
    const float exponent = before - after;
    return exponent < -126.0f ? 0.0f : power_of_two(exponent > 126.0f ? 126.0f : exponent);
  }
  SIGHTLINE_INLINE float log_of_unit(float reference) {
    return reference * core::kLn2 + static_cast<float>(Weight::kLogUnit);
  }

 private:
  SIGHTLINE_INLINE float power_of_two(float exponent) {
    return core::float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(exponent) + 127) << 23);
  }
};

SIGHTLINE_INLINE float reference_of(WeightFunction function, float largest) {
  return core::with_weight(function, [&](auto weight) { return Relative<decltype(weight)>::reference(largest); });
}
SIGHTLINE_INLINE float change_of_reference(WeightFunction function, float before, float after) {
  return core::with_weight(function, [&](auto weight) { return Relative<decltype(weight)>::change(before, after); });
}
// A weighted value whose row's weights have become 0 is gone, even if it was infinite.
SIGHTLINE_INLINE float rescaled(float sum, float change) { return change == 0.0f ? 0.0f : sum * change; }

SIGHTLINE_INLINE float relative_weight(WeightFunction function, float score, float reference) {
  return core::with_weight(function, [&](auto weight) {
    using Of = Relative<decltype(weight)>;
    return Of::weight(score, Of::operand(reference));
  });
}
SIGHTLINE_INLINE float log_of_unit(WeightFunction function, float reference) {
  return core::with_weight(function, [&](auto weight) { return Relative<decltype(weight)>::log_of_unit(reference); });
}

// Section 2 of MATH.md, what a row's second sweep needs: mean and peak of its relative weights.
struct RowPeak {
  float mean;
  float inverse_peak;
  bool flat;
};

SIGHTLINE_INLINE RowPeak find_peak(const ReweightOptions& options, int64_t visible, float normalizer,
                                   float largest_weight) {
  const bool exempt = visible <= options.exempt_rows || options.offset == 0.0f;
  RowPeak peak;
  peak.mean = exempt || visible == 0 ? 0.0f : options.offset * normalizer / static_cast<float>(visible);
  const float height = largest_weight - peak.mean;
  peak.flat = (!exempt && !(height > core::kFlatRow * largest_weight)) || !(height > 0.0f);
  peak.inverse_peak = peak.flat ? 0.0f : 1.0f / height;
  return peak;
}

SIGHTLINE_INLINE float reweighted(const ReweightOptions& options, const RowPeak& peak, float weight) {
  if (peak.flat) return weight;
  const float excess = (weight - peak.mean) * peak.inverse_peak;
  // An excess that is NaN stays one.
  return excess < 0.0f ? 0.0f : core::power(core::Scalar{excess}, options.power).value;
}

}  // namespace sightline::cuda
