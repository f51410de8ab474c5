"""Products of tiles and sums over tiles, at the precision that MATH.md asks for.

fp32 operands are multiplied in true fp32. Weights are rounded to the dtype of the operand they meet. In fp16 a tile of
gradients is first scaled by a power of two, so that small ones do not vanish below the smallest fp16 number.

0 * NaN must not reach a row that gives the key no weight. The products run at full speed and let it through; programs
whose result is not finite run again as the safe variant, where non-finite operands meet the signs of the weights alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.compat import round_to, round_to_bfloat16


@triton.jit
def dot(left, right):
    """left @ right in fp32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_product(total, weights, operand, variant: tl.constexpr):
    """total + weights @ operand; the weights are already rounded."""
    if variant.safe:
        finite = tl.abs(operand.to(tl.float32)) < float("inf")
        product = dot(weights, tl.where(finite, operand, tl.zeros_like(operand)))
        return total + product + non_finite_part(weights, operand)
    elif variant.dtype == "fp32":
        # A sum per tile first: one chain of N additions would lose a digit by a hundred thousand keys.
        return total + dot(weights, operand)
    else:
        return tl.dot(weights, operand, total, input_precision="ieee")


@triton.jit
def non_finite_part(weights, operand):
    """What infinities and NaNs of `operand` contribute where they meet a weight that is not 0: 0, inf, -inf or NaN.

    The products of signs with the codes 1 (to +inf), 2^8 (to -inf) and 2^16 (NaN) count up to 128 of each kind.
    """
    wide = operand.to(tl.float32)
    infinity = float("inf")
    undefined = tl.where(wide != wide, 65536.0, 0.0)
    upward = undefined + tl.where(wide == infinity, 1.0, tl.where(wide == -infinity, 256.0, 0.0))
    downward = undefined + tl.where(wide == infinity, 256.0, tl.where(wide == -infinity, 1.0, 0.0))
    signs = weights.to(tl.float32)
    above = tl.where(signs > 0.0, 1.0, 0.0)
    below = tl.where(signs < 0.0, 1.0, 0.0)
    codes = tl.dot(round_to_bfloat16(above), round_to_bfloat16(upward))
    codes = tl.dot(round_to_bfloat16(below), round_to_bfloat16(downward), codes).to(tl.int32)
    to_plus = (codes & 255) > 0
    to_minus = ((codes >> 8) & 255) > 0
    to_nan = (codes >= 65536) | (to_plus & to_minus)
    return tl.where(to_nan, float("nan"), tl.where(to_plus, infinity, tl.where(to_minus, -infinity, 0.0)))


@triton.jit
def is_finite(tile):
    """Whether a tile holds no NaN and no infinity, as one number."""
    return tl.max((tl.abs(tile) < float("inf")).to(tl.int32) ^ 1) == 0


@triton.jit
def add_compensated(total, lost, term):
    """(total, lost) + term by Kahan: the error of a sum over tiles stays flat in their number."""
    corrected = term - lost
    risen = total + corrected
    return risen, (risen - total) - corrected


@triton.jit
def scaled_to_fit(tile, variant: tl.constexpr):
    """(tile rounded, what undoes its scale): a product operand of gradients of any magnitude."""
    if variant.dtype == "fp16":
        largest = tl.max(tl.where(tl.abs(tile) < float("inf"), tl.abs(tile), 0.0))
        exponent = tl.where(largest > 0.0, tl.floor(tl.log2(tl.where(largest > 0.0, largest, 1.0))), 0.0)
        exponent = tl.minimum(tl.maximum(exponent, -100.0), 100.0)
        return round_to(tile * tl.exp2(-exponent), variant), tl.exp2(exponent)
    else:
        return round_to(tile, variant), 1.0


@triton.jit
def add_scaled_product(total, weights, operand, undo, variant: tl.constexpr):
    """total + undo * weights @ operand, for a pair from scaled_to_fit."""
    if variant.dtype == "fp16":
        return total + add_product(tl.zeros_like(total), weights, operand, variant) * undo
    else:
        return add_product(total, weights, operand, variant)
