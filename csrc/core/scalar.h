// One float behind the interface that polynomials.h and weights.h ask of a vector: what one thread of a GPU computes
// with, and the same on the host, where the tests sweep it.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/macros.h"

namespace sightline::core {

struct Scalar {
  float value;
  SIGHTLINE_INLINE Scalar broadcast(float x) { return {x}; }
};

SIGHTLINE_INLINE Scalar operator+(Scalar a, Scalar b) { return {a.value + b.value}; }
SIGHTLINE_INLINE Scalar operator-(Scalar a, Scalar b) { return {a.value - b.value}; }
SIGHTLINE_INLINE Scalar operator*(Scalar a, Scalar b) { return {a.value * b.value}; }
SIGHTLINE_INLINE Scalar operator/(Scalar a, Scalar b) { return {a.value / b.value}; }
SIGHTLINE_INLINE Scalar reciprocal(Scalar x) { return {1.0f / x.value}; }
SIGHTLINE_INLINE Scalar fma(Scalar a, Scalar b, Scalar c) { return {fmaf(a.value, b.value, c.value)}; }
SIGHTLINE_INLINE Scalar select(bool condition, Scalar yes, Scalar no) { return condition ? yes : no; }
SIGHTLINE_INLINE bool less(Scalar a, Scalar b) { return a.value < b.value; }
SIGHTLINE_INLINE bool equal(Scalar a, Scalar b) { return a.value == b.value; }
// Where either is NaN this returns b, as the vectors do.
SIGHTLINE_INLINE Scalar maximum(Scalar a, Scalar b) { return a.value > b.value ? a : b; }
SIGHTLINE_INLINE Scalar absolute(Scalar x) { return {fabsf(x.value)}; }

// Exact for |x| < 2^22; times_power_of_two bounds what lies outside.
SIGHTLINE_INLINE Scalar round_to_integer(Scalar x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return {(x.value + magic) - magic};
}

SIGHTLINE_INLINE Scalar times_power_of_two(Scalar factor, Scalar whole, Scalar x) {
  const bool tiny = x.value < -126.0f;
  // NaN to an integer is whatever the machine makes of it: factor is NaN then and stays NaN under any finite power.
  const int32_t exponent = static_cast<int32_t>(tiny || whole.value != whole.value ? 0.0f : whole.value);
  const float power = float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
  return {tiny ? 0.0f : factor.value * power};
}

SIGHTLINE_INLINE Scalar split_exponent(Scalar x, Scalar& mantissa) {
  const uint32_t bits = bits_of_float(x.value);
  mantissa.value = float_from_bits((bits & 0x007fffffu) | 0x3f800000u);
  return {static_cast<float>(static_cast<int32_t>(bits >> 23) - 127)};
}

}  // namespace sightline::core
