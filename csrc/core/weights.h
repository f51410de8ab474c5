// The weight functions phi of MATH.md section 1, for any vector type (see polynomials.h).
//
// forward(score): phi(score). A masked score is -inf and gets exactly 0.
// forward_and_derivative: both from one exp2.
// A weight function whose values need a shift by the row maximum says so with kShifted.
#pragma once

#include "core/polynomials.h"

namespace sightline::core {

struct Exponential {
  static constexpr bool kShifted = true;

  template <class V>
  SIGHTLINE_INLINE V forward(V score) {
    return exp2(score * V::broadcast(kLog2E));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative(V score, V& derivative) {
    return derivative = forward(score);
  }
};

// log(1 + e^s) = ln2 * (max(x, 0) + log2(1 + 2^-|x|)), x = s log2(e); its derivative is the logistic function.
struct SoftPlus {
  static constexpr bool kShifted = false;

  template <class V>
  SIGHTLINE_INLINE V forward(V score) {
    const V x = score * V::broadcast(kLog2E);
    const V decay = exp2(V::broadcast(0.0f) - absolute(x));
    return V::broadcast(kLn2) * (maximum(V::broadcast(0.0f), x) + log2_one_plus(decay));
  }
  template <class V>
  SIGHTLINE_INLINE V forward_and_derivative(V score, V& derivative) {
    const V one = V::broadcast(1.0f);
    const V x = score * V::broadcast(kLog2E);
    const V decay = exp2(V::broadcast(0.0f) - absolute(x));
    derivative = select(less(x, V::broadcast(0.0f)), decay, one) / (one + decay);
    return V::broadcast(kLn2) * (maximum(V::broadcast(0.0f), x) + log2_one_plus(decay));
  }
};

}  // namespace sightline::core
