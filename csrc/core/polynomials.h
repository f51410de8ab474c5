// exp2, log2(1 + y), log2 and tanh as short polynomials on the FMA units, for any vector type V.
//
// V is a type with arithmetic operators and these free functions found by its namespace: fma, maximum, select, less,
// equal, reciprocal, round_to_integer, times_power_of_two, fraction, times_power_of_floor, split_exponent, absolute;
// V::broadcast(float). On a GPU it is scalar.h's, which lacks what only the short ones need. The coefficients are
// minimax in relative error (tools/fit_polynomials.py); tests/csrc/test_elementwise.py sweeps the whole range per
// instruction set.
#pragma once

#include "core/macros.h"

namespace sightline::core {

constexpr float kLog2E = 1.442695040888963f;
constexpr float kLn2 = 0.693147180559945f;

// The coefficients are local to the functions that use them: a GPU cannot refer to an array of the host.
template <class V, int kCount>
SIGHTLINE_INLINE V polynomial(const float (&coefficients)[kCount], V x) {
  V result = V::broadcast(coefficients[kCount - 1]);
  SIGHTLINE_UNROLL
  for (int degree = kCount - 2; degree >= 0; --degree) result = fma(result, x, V::broadcast(coefficients[degree]));
  return result;
}

// 2^(x factor) for x factor <= 127. Below -126 it is exactly 0, so that no denormal slows the products; NaN stays NaN.
// The product is not rounded before its whole part is taken off: at x factor = -20 that rounding would cost 10 ulp.
template <class V>
SIGHTLINE_INLINE V exp2_of_product(V x, V factor) {
  // 2^f = P(f) on [-1/2, 1/2], relative error 1.9e-9 before rounding.
  constexpr float kExp2[] = {1.000000001e+00f, 6.931472057e-01f, 2.402264689e-01f, 5.550328777e-02f,
                             9.618488957e-03f, 1.339993122e-03f, 1.534581200e-04f};
  const V product = x * factor;
  const V whole = round_to_integer(product);
  return times_power_of_two(polynomial(kExp2, fma(x, factor, V::broadcast(0.0f) - whole)), whole, product);
}

// 2^x, as above.
template <class V>
SIGHTLINE_INLINE V exp2(V x) {
  return exp2_of_product(x, V::broadcast(1.0f));
}

// log2(1 + y) for y in [0, 1].
template <class V>
SIGHTLINE_INLINE V log2_one_plus(V y) {
  // log2(1 + y) = y P(y), relative error 4.7e-9 before rounding.
  constexpr float kLog2OnePlus[] = {1.442695034e+00f, -7.213461127e-01f, 4.808497149e-01f, -3.600120487e-01f,
                                    2.838637999e-01f, -2.208130250e-01f, 1.529784031e-01f, -8.217523761e-02f,
                                    2.863960631e-02f, -4.680139039e-03f};
  return y * polynomial(kLog2OnePlus, y);
}

// The same two with errors of 8.2e-08 and 2.1e-07, exact at 0 and 1: weights that are rounded to bfloat16 next need
// no more, nor the logarithm of their sum.
template <class V>
SIGHTLINE_INLINE V exp2_short(V x) {
  // On [0, 1]: AVX-512 has an instruction for the fraction above the next lower integer, and one that takes that
  // integer off x by itself.
  constexpr float kExp2[] = {1.000000000e+00f, 6.931513119e-01f, 2.401644492e-01f,
                             5.579991677e-02f, 9.017025196e-03f, 1.867132492e-03f};
  return times_power_of_floor(polynomial(kExp2, fraction(x)), x);
}
template <class V>
SIGHTLINE_INLINE V log2_one_plus_short(V y) {
  constexpr float kLog2OnePlus[] = {1.442694744e+00f, -7.213082634e-01f, 4.800311779e-01f, -3.531800088e-01f,
                                    2.553402180e-01f, -1.542890124e-01f, 6.277663176e-02f, -1.206548713e-02f};
  return y * polynomial(kLog2OnePlus, y);
}

// log2(x) for normal x > 0.
template <class V>
SIGHTLINE_INLINE V log2(V x) {
  V mantissa;
  const V exponent = split_exponent(x, mantissa);  // mantissa in [1, 2)
  return exponent + log2_one_plus(mantissa - V::broadcast(1.0f));
}

template <class V>
SIGHTLINE_INLINE V tanh(V u) {
  // tanh(u) = u P(u^2) for |u| <= 1/4: the Taylor series to u^9, truncation 8e-9.
  constexpr float kTanh[] = {1.0f, -0.333333333f, 0.133333333f, -0.0539682540f, 0.0218694885f};
  const V one = V::broadcast(1.0f);
  const V magnitude = absolute(u);
  const V decay = exp2_of_product(magnitude, V::broadcast(-2.0f * kLog2E));
  const V large = (one - decay) / (one + decay);
  const V small = magnitude * polynomial(kTanh, u * u);
  const V result = select(less(magnitude, V::broadcast(0.25f)), small, large);
  return select(less(u, V::broadcast(0.0f)), V::broadcast(0.0f) - result, result);
}

// x^power for x in [0, 1]; a whole power up to 64 by repeated squaring, any other through log2 and exp2.
template <class V>
SIGHTLINE_INLINE V power(V x, float exponent) {
  const int whole = static_cast<int>(exponent);
  if (static_cast<float>(whole) == exponent && whole <= 64) {
    V result = V::broadcast(1.0f);
    V square = x;
    for (int bits = whole; bits != 0; bits >>= 1) {
      if (bits & 1) result = result * square;
      square = square * square;
    }
    return result;
  }
  const V tiny = V::broadcast(1.17549435e-38f);
  const V result = exp2_of_product(log2(maximum(tiny, x)), V::broadcast(exponent));
  return select(equal(x, x), select(less(x, tiny), V::broadcast(0.0f), result), x);  // NaN stays NaN
}

}  // namespace sightline::core
