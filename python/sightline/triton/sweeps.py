"""The loops over key tiles that forward and decoding share (MATH.md sections 1 and 2).

`attend` is plain attention in one sweep; re-weighting takes two, `measure` and `sharpen`. Each runs over the tiles
between two keys, so that a caller can give the tiles that all rows see as a whole to a copy of the loop that masks
nothing. Normalisers are compensated sums; in fp32 so are the weighted values. Between the weights and their product
is the place where a tile's scores and weights are at hand, and statistics belong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.compat import round_to
from sightline.triton.descriptors import load_key_tile, load_value_tile
from sightline.triton.dropout import kept
from sightline.triton.products import add_compensated, add_product, dot
from sightline.triton.scores import key_factors, score_tile
from sightline.triton.skipping import keep_maxima
from sightline.triton.weights import FLAT_ROW, LOG2_E, positive_part, reweigh, weigh


class Sums(NamedTuple):
    """What rows have gathered. A `*_lost` is the rounding error of its sum, for add_compensated."""

    shift: Any  # of a shifted function the running maximum; else in fp16 a running exponent of two, or 0
    normalizer: Any
    normalizer_lost: Any
    rounded: Any  # the sum of the weights as rounded for the product, in the scale of `value_sum`
    value_sum: Any
    value_sum_lost: Any


class Spread(NamedTuple):
    """What the first sweep of re-weighting finds."""

    shift: Any
    largest: Any  # score
    normalizer: Any
    normalizer_lost: Any


class Peaks(NamedTuple):
    """Row constants of the second sweep."""

    shift: Any
    mean: Any
    peak: Any
    inverse_peak: Any  # 0 where the row is flat
    flat: Any
    flat_factor: Any  # 1 / max f where the row is flat


class SharpSums(NamedTuple):
    """What the second sweep gathers."""

    weight_sum: Any
    weight_sum_lost: Any
    rounded: Any
    response: Any
    response_lost: Any
    value_sum: Any
    value_sum_lost: Any
    response_values: Any


@triton.jit
def finite_shift(shift):
    """-inf stands for no key so far; subtracting 0 in its place keeps exp(-inf) = 0."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def attend(
    problem,
    variant: tl.constexpr,
    MASKED: tl.constexpr,
    start,
    stop,
    rows,
    descriptors,
    factor,
    queries,
    sums,
):
    """Plain attention over the key tiles from `start` to `stop`."""
    shift = sums.shift
    normalizer = sums.normalizer
    normalizer_lost = sums.normalizer_lost
    rounded = sums.rounded
    values = sums.value_sum
    values_lost = sums.value_sum_lost
    # Triton 3.7 splits this loop among warps if one sum beside the values shrinks with them: all have to be one tensor.
    PACKED: tl.constexpr = variant.specialized and variant.shifted
    if PACKED:
        packed = tl.join(tl.join(normalizer, rounded), tl.join(normalizer_lost, tl.zeros_like(rounded)))
    for first_key in tl.range(start, stop, variant.key_tile, warp_specialize=variant.specialized):
        keys = first_key + tl.arange(0, variant.key_tile)
        key_vectors = load_key_tile(problem, variant, MASKED, descriptors, rows, first_key)
        key_factor = key_factors(problem, variant, MASKED, rows, keys, key_vectors)
        scores = score_tile(problem, variant, MASKED, rows, factor, queries, keys, key_vectors, key_factor)
        if not variant.shifted:
            weights = weigh(scores, 0.0, variant)
            tile_sum = tl.sum(weights, 1)
            if variant.dtype == "fp16":
                # fp16 holds nothing below 6e-8: a running power of two keeps the largest weight of a row near 1.
                top = weigh(tl.max(scores, 1), 0.0, variant)
                exponent = tl.ceil(tl.log2(tl.where(top > 0.0, top, 1.2e-38)))
                raised = tl.maximum(shift, tl.minimum(tl.maximum(exponent, -126.0), 126.0))
                decay = tl.exp2(shift - raised)
                weights = weights * tl.exp2(-raised)[:, None]
        else:
            raised = tl.maximum(shift, tl.max(scores, 1))
            base = finite_shift(raised)
            decay = tl.exp2((shift - base) * LOG2_E)
            weights = weigh(scores, base[:, None], variant)
            tile_sum = tl.sum(weights, 1)
            if not PACKED:
                normalizer = normalizer * decay
                normalizer_lost = normalizer_lost * decay
        weights = round_to(weights, variant)
        if PACKED:
            totals, lost = tl.split(packed * decay[:, None, None])
            totals, lost = add_compensated(totals, lost, tl.join(tile_sum, tl.sum(weights.to(tl.float32), 1)))
            packed = tl.join(totals, lost)
        else:
            normalizer, normalizer_lost = add_compensated(normalizer, normalizer_lost, tile_sum)
        if variant.shifted or variant.dtype == "fp16":
            shift = raised
            if variant.safe:
                # An infinite value whose weight has shrunk to nothing is gone.
                values = tl.where(decay[:, None] == 0.0, 0.0, values * decay[:, None])
            else:
                values = values * decay[:, None]
            if variant.dtype == "fp32":
                values_lost = values_lost * decay[:, None]
            elif not PACKED:
                rounded = rounded * decay
        if variant.dtype != "fp32" and not PACKED:
            rounded += tl.sum(weights.to(tl.float32), 1)
        if variant.dropout:
            keep = kept(rows.dropout_key, keys, problem.dropout_threshold)
            weights = tl.where(keep, weights, tl.zeros_like(weights))
        value_vectors = load_value_tile(problem, variant, MASKED, descriptors, rows, first_key)
        if variant.dtype == "fp32" and not variant.safe:
            product = dot(weights, value_vectors)
            values, values_lost = add_compensated(values, values_lost, product)
        else:
            values = add_product(values, weights, value_vectors, variant)
    if PACKED:
        totals, lost = tl.split(packed)
        normalizer, rounded = tl.split(totals)
        normalizer_lost, rounded_lost = tl.split(lost)
        rounded -= rounded_lost
    return Sums(shift, normalizer, normalizer_lost, rounded, values, values_lost)


@triton.jit
def attend_range(problem, variant: tl.constexpr, keys, rows, descriptors, factor, queries, start_sums):
    """Plain attention over a key range."""
    sums = start_sums
    if variant.masked_everywhere or variant.safe:
        sums = attend(problem, variant, True, keys.start, keys.stop, rows, descriptors, factor, queries, sums)
    else:
        if variant.window_left or variant.documents:
            sums = attend(problem, variant, True, keys.start, keys.full_start, rows, descriptors, factor, queries, sums)
        sums = attend(
            problem, variant, False, keys.full_start, keys.full_stop, rows, descriptors, factor, queries, sums
        )
        sums = attend(problem, variant, True, keys.full_stop, keys.stop, rows, descriptors, factor, queries, sums)
    return sums


@triton.jit
def measure(
    problem,
    variant: tl.constexpr,
    MASKED: tl.constexpr,
    start,
    stop,
    rows,
    descriptors,
    factor,
    queries,
    spread,
    maxima,
):
    """First sweep of re-weighting: the normaliser and the largest score; where there are `maxima`, each tile's too."""
    shift = spread.shift
    largest = spread.largest
    normalizer = spread.normalizer
    normalizer_lost = spread.normalizer_lost
    if maxima is not None:
        shared = largest
    for first_key in tl.range(start, stop, variant.key_tile, warp_specialize=variant.specialized):
        keys = first_key + tl.arange(0, variant.key_tile)
        key_vectors = load_key_tile(problem, variant, MASKED, descriptors, rows, first_key)
        key_factor = key_factors(problem, variant, MASKED, rows, keys, key_vectors)
        scores = score_tile(problem, variant, MASKED, rows, factor, queries, keys, key_vectors, key_factor)
        top = tl.max(scores, 1)
        if maxima is not None:
            place = (first_key - start) // variant.key_tile
            is_last = first_key + variant.key_tile >= stop
            shared = keep_maxima(variant, maxima, place, is_last, shared, top)
        largest = tl.maximum(largest, top)
        if not variant.shifted:
            weights = weigh(scores, 0.0, variant)
        else:
            base = finite_shift(largest)
            decay = tl.exp2((shift - base) * LOG2_E)
            shift = largest
            normalizer = normalizer * decay
            normalizer_lost = normalizer_lost * decay
            weights = weigh(scores, base[:, None], variant)
        normalizer, normalizer_lost = add_compensated(normalizer, normalizer_lost, tl.sum(weights, 1))
    return Spread(shift, largest, normalizer, normalizer_lost)


@triton.jit
def measure_range(problem, variant: tl.constexpr, keys, rows, descriptors, factor, queries, start_spread, maxima):
    """The first sweep over a key range; maxima of the tiles that all rows see as a whole, or None."""
    spread = start_spread
    if variant.masked_everywhere or variant.safe:
        spread = measure(
            problem, variant, True, keys.start, keys.stop, rows, descriptors, factor, queries, spread, None
        )
    else:
        if variant.window_left or variant.documents:
            spread = measure(
                problem, variant, True, keys.start, keys.full_start, rows, descriptors, factor, queries, spread, None
            )
        spread = measure(
            problem, variant, False, keys.full_start, keys.full_stop, rows, descriptors, factor, queries, spread, maxima
        )
        spread = measure(
            problem, variant, True, keys.full_stop, keys.stop, rows, descriptors, factor, queries, spread, None
        )
    return spread


@triton.jit
def find_peaks(problem, variant: tl.constexpr, visible, spread):
    """Between the sweeps: mean, peak and the flat-row rule, as in csrc/cpu/weigh_tile.h."""
    exempt = (visible <= problem.exempt_rows) | (problem.offset == 0.0)
    shift = finite_shift(spread.shift)
    top = weigh(spread.largest, shift, variant)
    some = tl.where(visible < 1.0, 1.0, visible)
    mean = tl.where(exempt | (visible == 0.0), 0.0, problem.offset * spread.normalizer / some)
    peak = top - mean
    sharp = (exempt | (peak > top * FLAT_ROW)) & (peak > 0.0)
    inverse_peak = tl.where(sharp, 1.0 / tl.where(sharp, peak, 1.0), 0.0)
    flat_factor = tl.where(top > 0.0, 1.0 / tl.where(top > 0.0, top, 1.0), 1.0)
    return Peaks(shift, mean, peak, inverse_peak, sharp == 0, flat_factor)


@triton.jit
def sharpen(
    problem,
    variant: tl.constexpr,
    MASKED: tl.constexpr,
    start,
    stop,
    rows,
    descriptors,
    factor,
    queries,
    peaks,
    sums,
    listed,
):
    """Second sweep of re-weighting: w = (r / m)^p, its sum and product with V; the responses likewise where saved.

    Over the key tiles from `start` to `stop`, or over those whose first keys stand in `listed` at these places.
    """
    weight_sum = sums.weight_sum
    weight_sum_lost = sums.weight_sum_lost
    rounded = sums.rounded
    response_sum = sums.response
    response_lost = sums.response_lost
    values = sums.value_sum
    values_lost = sums.value_sum_lost
    response_values = sums.response_values
    STEP: tl.constexpr = variant.key_tile if listed is None else 1
    for place in tl.range(start, stop, STEP, warp_specialize=variant.specialized):
        first_key = place
        if listed is not None:
            first_key = tl.load(listed + place)
        keys = first_key + tl.arange(0, variant.key_tile)
        key_vectors = load_key_tile(problem, variant, MASKED, descriptors, rows, first_key)
        key_factor = key_factors(problem, variant, MASKED, rows, keys, key_vectors)
        scores = score_tile(problem, variant, MASKED, rows, factor, queries, keys, key_vectors, key_factor)
        plain = weigh(scores, peaks.shift[:, None], variant)
        excess = positive_part(plain - peaks.mean[:, None]) * peaks.inverse_peak[:, None]
        response, weights = reweigh(excess, problem.power, variant.whole_power)
        weights = tl.where(peaks.flat[:, None], plain * peaks.flat_factor[:, None], weights)
        weight_sum, weight_sum_lost = add_compensated(weight_sum, weight_sum_lost, tl.sum(weights, 1))
        weights = round_to(weights, variant)
        if variant.dtype != "fp32":
            rounded += tl.sum(weights.to(tl.float32), 1)
        if variant.dropout:
            keep = kept(rows.dropout_key, keys, problem.dropout_threshold)
            weights = tl.where(keep, weights, tl.zeros_like(weights))
        value_vectors = load_value_tile(problem, variant, MASKED, descriptors, rows, first_key)
        if variant.dtype == "fp32" and not variant.safe:
            product = dot(weights, value_vectors)
            values, values_lost = add_compensated(values, values_lost, product)
        else:
            values = add_product(values, weights, value_vectors, variant)
        if variant.saves:
            response_sum, response_lost = add_compensated(response_sum, response_lost, tl.sum(response, 1))
            response = round_to(response, variant)
            if variant.dropout:
                response = tl.where(keep, response, tl.zeros_like(response))
            response_values = add_product(response_values, response, value_vectors, variant)
    return SharpSums(
        weight_sum, weight_sum_lost, rounded, response_sum, response_lost, values, values_lost, response_values
    )


@triton.jit
def sharpen_range(
    problem, variant: tl.constexpr, keys, rows, descriptors, factor, queries, peaks, start_sums, listed, count
):
    """The second sweep over a key range; of the tiles that all rows see as a whole the `count` listed ones, or all."""
    sums = start_sums
    if variant.masked_everywhere or variant.safe:
        sums = sharpen(
            problem, variant, True, keys.start, keys.stop, rows, descriptors, factor, queries, peaks, sums, None
        )
    else:
        if variant.window_left or variant.documents:
            sums = sharpen(
                problem,
                variant,
                True,
                keys.start,
                keys.full_start,
                rows,
                descriptors,
                factor,
                queries,
                peaks,
                sums,
                None,
            )
        if listed is None:
            sums = sharpen(
                problem,
                variant,
                False,
                keys.full_start,
                keys.full_stop,
                rows,
                descriptors,
                factor,
                queries,
                peaks,
                sums,
                None,
            )
        else:
            sums = sharpen(problem, variant, False, 0, count, rows, descriptors, factor, queries, peaks, sums, listed)
        sums = sharpen(
            problem, variant, True, keys.full_stop, keys.stop, rows, descriptors, factor, queries, peaks, sums, None
        )
    return sums


@triton.jit
def start_sums(problem, variant: tl.constexpr, rows, WITH_SINK: tl.constexpr):
    """Nothing gathered yet but, where asked, the sink."""
    zeros = tl.zeros(rows.query.shape, tl.float32)
    values = tl.full((variant.row_tile, variant.block_value_width), 0.0, tl.float32)
    values_lost = values if variant.dtype == "fp32" else zeros
    normalizer = zeros
    if not variant.shifted:
        shift = zeros - 126.0 if variant.dtype == "fp16" else zeros
    else:
        shift = zeros + float("-inf")
        if WITH_SINK and problem.sinks is not None:
            shift = tl.load(problem.sinks + rows.head)
            normalizer = tl.where(shift == float("-inf"), 0.0, 1.0)
    return Sums(shift, normalizer, zeros, normalizer, values, values_lost)


@triton.jit
def start_spread(variant: tl.constexpr, rows):
    """Nothing measured yet."""
    zeros = tl.zeros(rows.query.shape, tl.float32)
    nothing = zeros + float("-inf")
    return Spread(nothing if variant.shifted else zeros, nothing, zeros, zeros)


@triton.jit
def start_sharp_sums(variant: tl.constexpr, rows):
    """Nothing sharpened yet."""
    zeros = tl.zeros(rows.query.shape, tl.float32)
    values = tl.full((variant.row_tile, variant.block_value_width), 0.0, tl.float32)
    values_lost = values if variant.dtype == "fp32" else zeros
    return SharpSums(zeros, zeros, zeros, zeros, zeros, values, values_lost, values if variant.saves else zeros)
