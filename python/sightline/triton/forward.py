"""Weighted attention, forward (MATH.md sections 1 and 2).

Work: one program per tile of query rows of one head. Tiles are handed out from the last one backwards, all heads of a
tile before the next: under causality the last rows see most keys, so the longest programs start first and the short
ones fill the gaps. A program walks the key tiles that any of its rows sees (sweeps.py), those that all rows see
without masks.

In registers: the queries, the weighted sum of values and row quantities; keys and values stream through shared memory,
loaded by pointers or, where the tile says so, by tensor descriptors (descriptors.py).
Softplus needs no running maximum. Re-weighting sweeps twice, the second time past the tiles whose weights do not count
(skipping.py), and keeps U beside the values when backward will need it.

A program whose result is not finite says so in `repairs`. A second launch, of the variant whose products skip zero
weights (products.py), runs those programs again and all others return at once: in the first kernel such products
would cost registers, and finite data must pay nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.descriptors import describe_keys
from sightline.triton.key_range import visible_range
from sightline.triton.products import is_finite
from sightline.triton.rows import load_rows, row_factors, set_up_rows, store_rows
from sightline.triton.skipping import Maxima, list_tiles
from sightline.triton.sweeps import (
    attend_range,
    find_peaks,
    measure_range,
    sharpen_range,
    start_sharp_sums,
    start_spread,
    start_sums,
)


@triton.jit
def attention_forward(
    problem, output, log_normalizer, saved, units, tiles, scratch, first, repairs, variant: tl.constexpr
):
    """output (B, H, M, Dv), log_normalizer (B, H, M) and, where the variant saves, the SavedRows.

    `first`: how many tiles earlier launches have done.
    """
    item = first + tl.program_id(0)
    if variant.safe and tl.load(repairs + item) == 0:
        return
    rows = set_up_rows(problem, variant, item % units, tiles - 1 - item // units)
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    factors = row_factors(problem, variant, rows, queries)
    keys = visible_range(variant, rows)
    # Before Triton 3.7 no device function may return None.
    descriptors = None
    if variant.descriptors:
        descriptors = describe_keys(problem, variant, rows)
    if variant.reweight:
        spread = start_spread(variant, rows)
        if variant.skips:
            place = tl.program_id(0).to(tl.int64)
            maxima = Maxima(scratch.maxima + place * scratch.groups * variant.row_tile, scratch.sharing)
            listed = scratch.listed + place * scratch.tiles
            spread = measure_range(problem, variant, keys, rows, descriptors, factors.factor, queries, spread, maxima)
            peaks = find_peaks(problem, variant, factors.visible, spread)
            whole = (keys.full_stop - keys.full_start) // variant.key_tile
            count = list_tiles(problem, variant, maxima, listed, keys.full_start, whole, factors.visible, peaks)
            if scratch.counts is not None:
                tl.store(scratch.counts + item * 2, whole)
                tl.store(scratch.counts + item * 2 + 1, count)
        else:
            listed = None
            count = 0
            spread = measure_range(problem, variant, keys, rows, descriptors, factors.factor, queries, spread, None)
            peaks = find_peaks(problem, variant, factors.visible, spread)
        sums = start_sharp_sums(variant, rows)
        sums = sharpen_range(
            problem, variant, keys, rows, descriptors, factors.factor, queries, peaks, sums, listed, count
        )
        finite = is_finite(sums.value_sum)
        if variant.saves:
            finite = finite & is_finite(sums.response_values)
        store_sharp_rows(problem, variant, output, log_normalizer, saved, rows, spread.normalizer, peaks, sums)
    else:
        sums = start_sums(problem, variant, rows, True)
        sums = attend_range(problem, variant, keys, rows, descriptors, factors.factor, queries, sums)
        finite = is_finite(sums.value_sum)
        store_plain_rows(problem, variant, output, log_normalizer, saved, rows, sums)
    if not variant.safe:
        tl.store(repairs + item, (finite == 0).to(tl.int32))


@triton.jit
def store_log_normalizer(variant: tl.constexpr, log_normalizer, rows, shift, normalizer):
    """ln Z; -inf for a row that sees nothing (its sink's logit where there is one, which is then the shift)."""
    empty = normalizer == 0.0
    result = tl.log(tl.where(empty, 1.0, normalizer))
    result = result + (shift if variant.shifted else variant.log_unit)
    tl.store(log_normalizer + rows.index, tl.where(empty, float("-inf"), result), mask=rows.live)


@triton.jit
def store_plain_rows(problem, variant: tl.constexpr, output, log_normalizer, saved, rows, sums):
    """Divide, round and store what plain attention gathered."""
    shift = sums.shift
    divisor = sums.normalizer if variant.dtype == "fp32" else sums.rounded
    inverse = tl.where(divisor == 0.0, 0.0, 1.0 / tl.where(divisor == 0.0, 1.0, divisor))
    if variant.dropout:
        inverse = inverse * problem.dropout_scale
    store_rows(output, rows, sums.value_sum * inverse[:, None], variant.value_width, variant.block_value_width)
    store_log_normalizer(variant, log_normalizer, rows, shift, sums.normalizer)
    if variant.saves:
        kept_shift = tl.zeros_like(shift)
        if variant.shifted:
            kept_shift = tl.where(shift == float("-inf"), 0.0, shift)
        tl.store(saved.rows + rows.index * 2, kept_shift, mask=rows.live)
        tl.store(saved.rows + rows.index * 2 + 1, sums.normalizer, mask=rows.live)


@triton.jit
def store_sharp_rows(problem, variant: tl.constexpr, output, log_normalizer, saved, rows, normalizer, peaks, sums):
    """Divide, round and store what re-weighted attention gathered."""
    divisor = sums.weight_sum if variant.dtype == "fp32" else sums.rounded
    inverse = tl.where(divisor == 0.0, 0.0, 1.0 / tl.where(divisor == 0.0, 1.0, divisor))
    if variant.dropout:
        inverse = inverse * problem.dropout_scale
    store_rows(output, rows, sums.value_sum * inverse[:, None], variant.value_width, variant.block_value_width)
    store_log_normalizer(variant, log_normalizer, rows, peaks.shift, normalizer)
    if variant.saves:
        total = sums.weight_sum
        sharp = (peaks.flat == 0) & (total != 0.0)
        per_sum = tl.where(sharp, 1.0 / tl.where(sharp, total, 1.0), 0.0)
        columns = saved.rows + rows.index * 6
        tl.store(columns, peaks.shift, mask=rows.live)
        tl.store(columns + 1, normalizer, mask=rows.live)
        tl.store(columns + 2, peaks.mean, mask=rows.live)
        tl.store(columns + 3, tl.where(peaks.flat, 1.0, peaks.peak), mask=rows.live)
        tl.store(columns + 4, tl.where(peaks.flat, 0.0, total), mask=rows.live)
        tl.store(columns + 5, sums.response * per_sum, mask=rows.live)
        if variant.dropout:
            per_sum = per_sum * problem.dropout_scale
        widths = tl.arange(0, variant.block_value_width)
        pointers = saved.responses + (rows.index * variant.value_width)[:, None] + widths[None, :]
        live = rows.live[:, None] & (widths < variant.value_width)[None, :]
        tl.store(pointers, sums.response_values * per_sum[:, None], mask=live)
