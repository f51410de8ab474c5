"""The weight functions phi of MATH.md section 1, and the power of section 2, on tiles of scores in natural units.

Softplus is one exp2 and a polynomial on the FMA units: max(s, 0) + ln(1 + y) with y = exp(-|s|). Its weights and slopes
come in units of ln 2, as those of csrc/core/weights.h: the unit cancels in every weight, log2(1 + y) = y P(y) needs no
factor, and a row with one key and score 0 gets exactly 1. The special-function unit is the limit on Hopper, so a second
operation on it would cost as much as the matrix work. A masked score is -inf and every function gives exactly 0 for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl


class WeightFunction(NamedTuple):
    """What kernels must know of a weight function beside its values; as in csrc/core/weights.h."""

    shifted: bool  # the row's largest score is taken off first: phi(s - t) is phi(s) phi(-t)
    log_unit: float  # the logarithm of the unit in which the weights come


WEIGHT_FUNCTIONS = {"softmax": WeightFunction(True, 0.0), "softplus": WeightFunction(False, math.log(math.log(2.0)))}

LOG2_E = tl.constexpr(1.4426950408889634)
FLAT_ROW = tl.constexpr(2.0**-16)

# log2(1 + y) = y P(y) on [0, 1]: kLog2OnePlus of csrc/core/polynomials.h (tools/fit_polynomials.py). Single constants,
# because Triton knows no arrays of them.
_C0 = tl.constexpr(1.442695034)
_C1 = tl.constexpr(-0.7213461127)
_C2 = tl.constexpr(0.4808497149)
_C3 = tl.constexpr(-0.3600120487)
_C4 = tl.constexpr(0.2838637999)
_C5 = tl.constexpr(-0.2208130250)
_C6 = tl.constexpr(0.1529784031)
_C7 = tl.constexpr(-0.08217523761)
_C8 = tl.constexpr(0.02863960631)
_C9 = tl.constexpr(-0.004680139039)

# kLog2OnePlus of log2_one_plus_short there.
_S0 = tl.constexpr(1.442694744)
_S1 = tl.constexpr(-0.7213082634)
_S2 = tl.constexpr(0.4800311779)
_S3 = tl.constexpr(-0.3531800088)
_S4 = tl.constexpr(0.2553402180)
_S5 = tl.constexpr(-0.1542890124)
_S6 = tl.constexpr(0.06277663176)
_S7 = tl.constexpr(-0.01206548713)


@triton.jit
def log2_one_plus_short(y):
    """The same to 2.1e-7 and exact at 0 and 1: enough for weights that are rounded to 16 bits next, and their sum."""
    p = y * _S7 + _S6
    p = p * y + _S5
    p = p * y + _S4
    p = p * y + _S3
    p = p * y + _S2
    p = p * y + _S1
    p = p * y + _S0
    return p * y


@triton.jit
def log2_one_plus(y):
    """log2(1 + y) for y in [0, 1], to a relative error of 5e-9 before rounding."""
    p = y * _C9 + _C8
    p = p * y + _C7
    p = p * y + _C6
    p = p * y + _C5
    p = p * y + _C4
    p = p * y + _C3
    p = p * y + _C2
    p = p * y + _C1
    p = p * y + _C0
    return p * y


@triton.jit
def softplus(scores, variant: tl.constexpr, DERIVED: tl.constexpr):
    """(phi(s), phi'(s)) of softplus in units of ln 2; without DERIVED the first twice."""
    decay = tl.exp2(tl.abs(scores) * -LOG2_E)
    if DERIVED:
        slope = tl.where(scores < 0.0, decay, 1.0) * LOG2_E / (1.0 + decay)
    if variant.dtype == "fp32":
        weight = tl.maximum(scores, 0.0) * LOG2_E + log2_one_plus(decay)
    else:
        weight = tl.maximum(scores, 0.0) * LOG2_E + log2_one_plus_short(decay)
    if not DERIVED:
        slope = weight
    return weight, slope


@triton.jit
def weigh_scores(scores, shift, variant: tl.constexpr, DERIVED: tl.constexpr):
    """(phi(s), phi'(s)) of the variant's weight function, relative to e^shift where it is shifted."""
    if variant.function == "softplus":
        return softplus(scores, variant, DERIVED)
    else:
        tl.static_assert(variant.function == "softmax")
        weight = tl.exp2((scores - shift) * LOG2_E)
        return weight, weight


@triton.jit
def weigh(scores, shift, variant: tl.constexpr):
    """phi(s) in the unit of its weight function; `shift` broadcasts to the scores and is finite."""
    weight, _ = weigh_scores(scores, shift, variant, False)
    return weight


@triton.jit
def weigh_with_derivative(scores, shift, variant: tl.constexpr):
    """(phi(s), phi'(s)) from one exp2."""
    return weigh_scores(scores, shift, variant, True)


@triton.jit
def hyperbolic_tangent(x):
    """tanh, by its Taylor series where the quotient of exponentials would cancel."""
    magnitude = tl.abs(x)
    decay = tl.exp2(magnitude * (-2.0 * LOG2_E))
    square = x * x
    series = 0.0218694885 * square - 0.0539682540
    series = series * square + 0.133333333
    series = series * square - 0.333333333
    series = (series * square + 1.0) * magnitude
    result = tl.where(magnitude < 0.25, series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0.0, -result, result)


@triton.jit
def positive_part(x):
    """max(x, 0) that lets NaN through, as tl.maximum does not."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def whole_power_of(x, exponent: tl.constexpr):
    """x^exponent for a whole exponent of at least 0, by repeated squaring."""
    result = tl.full(x.shape, 1.0, tl.float32)
    square = x
    for bit in tl.static_range(7):
        if (exponent >> bit) & 1:
            result = result * square
        if (exponent >> (bit + 1)) > 0:
            square = square * square
    return result


@triton.jit
def reweigh(excess, power, whole_power: tl.constexpr):
    """(x^(p - 1), x^p) for x in [0, 1], the first 0 where x is: w1 and w of MATH.md section 2."""
    if whole_power == 1:
        return tl.where(excess == 0.0, 0.0, 1.0), excess
    elif whole_power > 1:
        response = whole_power_of(excess, whole_power - 1)
        return response, response * excess
    else:
        tiny = 1.2e-38  # above the smallest normal number, or Triton would take it for fp64
        response = tl.exp2(tl.log2(tl.where(excess < tiny, tiny, excess)) * (power - 1.0))
        response = tl.where(excess < tiny, 0.0, response)
        return response, response * excess
