// The weight functions phi of MATH.md section 1, for any vector type (see polynomials.h), and the thresholds of
// sections 1 and 2.
//
// A weight function is never negative and never falls. It is a struct, a number, and a line of with_weight:
// forward(score): phi(score). A masked score is -inf and gets exactly 0.
// forward_short: the same by the short polynomials, of log2(e) times the score.
// forward_and_derivative: both from one exp2; _short likewise.
// kShifted: the largest score of its row is taken off a score first, so that phi(s - t) has to be phi(s) phi(-t).
// kLogUnit: the logarithm of the unit in which its values come.
#pragma once

#include <cstdint>

#include "core/polynomials.h"

namespace sightline {

enum class WeightFunction : int32_t { kSoftmax = 0, kSoftplus = 1 };
constexpr int64_t kWeightFunctions = 2;

}  // namespace sightline

namespace sightline::core {

// Under normalize_qk a norm is at least this; below it no gradient flows.
constexpr float kNormFloor = 1e-6f;
// Re-weighting leaves a row alone whose largest weight exceeds the mean by less than this share (section 2).
constexpr float kFlatRow = 0x1p-16f;

struct Exponential {
  static constexpr const char* kName = "softmax";
  static constexpr bool kShifted = true;
  static constexpr double kLogUnit = 0.0;

  template <class V>
  SIGHTLINE_INLINE V forward(V score) {
    return exp2_of_product(score, V::broadcast(kLog2E));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_short(V x) {
    return exp2_short(x);
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative(V score, V& derivative) {
    return derivative = forward(score);
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative_short(V x, V& derivative) {
    return derivative = exp2_short(x);
  }
};

// log(1 + e^s) in units of ln 2: max(x, 0) + log2(1 + 2^-|x|), x = s log2(e). The unit cancels in every weight, and a
// row with one key and score 0 gets exactly 1. The derivative is the logistic function, in the same unit.
struct SoftPlus {
  static constexpr const char* kName = "softplus";
  static constexpr bool kShifted = false;
  static constexpr double kLogUnit = -0.36651292058166432;  // ln(ln 2)

  template <class V>
  SIGHTLINE_INLINE V forward(V score) {
    const V decay = exp2_of_product(absolute(score), V::broadcast(-kLog2E));
    return fma(maximum(V::broadcast(0.0f), score), V::broadcast(kLog2E), log2_one_plus(decay));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_short(V x) {
    const V zero = V::broadcast(0.0f);
    return maximum(zero, x) + log2_one_plus_short(exp2_short(zero - absolute(x)));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative(V score, V& derivative) {
    const V zero = V::broadcast(0.0f);
    const V decay = exp2_of_product(absolute(score), V::broadcast(-kLog2E));
    derivative = logistic(score, decay);
    return fma(maximum(zero, score), V::broadcast(kLog2E), log2_one_plus(decay));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative_short(V x, V& derivative) {
    const V zero = V::broadcast(0.0f);
    const V decay = exp2_short(zero - absolute(x));
    derivative = logistic(x, decay);
    return maximum(zero, x) + log2_one_plus_short(decay);
  }

 private:
  // In units of ln 2; `decay` is e^-|score|.
  template <class V>
  SIGHTLINE_INLINE V logistic(V score, V decay) {
    const V log2_e = V::broadcast(kLog2E);
    const V above = select(less(score, V::broadcast(0.0f)), decay * log2_e, log2_e);
    return above * reciprocal(V::broadcast(1.0f) + decay);
  }
};

// Calls `call` with an object of the struct that `function` names.
SIGHTLINE_ANY_CALLER
template <class Call>
SIGHTLINE_INLINE auto with_weight(WeightFunction function, const Call& call) {
  switch (function) {  // no default: the compiler misses what is not here
    case WeightFunction::kSoftmax:
      break;
    case WeightFunction::kSoftplus:
      return call(SoftPlus{});
  }
  return call(Exponential{});
}

SIGHTLINE_INLINE bool is_shifted(WeightFunction function) {
  return with_weight(function, [](auto weight) { return decltype(weight)::kShifted; });
}

}  // namespace sightline::core
