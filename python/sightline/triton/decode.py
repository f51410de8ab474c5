"""Weighted attention for few query rows (MATH.md sections 1 and 2): the keys are split, and the parts merged.

Work: one program per split of the keys, key head and tile of rows; a tile holds the rows of all query heads of the key
head, so that keys and values are read once for the group. A program leaves its sums in memory, and `merge_splits` adds
them up, one program per tile of rows, in the order of the splits: the same bits from run to run.

Re-weighting needs the mean and the largest weight of the whole row before its second sweep. `measure_split` leaves
what a split knows of them; every program of the second sweep merges that for itself, which costs a few numbers per
split. Lengths are read on the device: splits past the end of a cache find nothing and add nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.forward import store_plain_rows, store_sharp_rows
from sightline.triton.key_range import part_of_range, visible_range
from sightline.triton.products import is_finite
from sightline.triton.rows import load_rows, row_factors, set_up_rows
from sightline.triton.sweeps import (
    SharpSums,
    Spread,
    Sums,
    attend_range,
    find_peaks,
    finite_shift,
    measure_range,
    sharpen_range,
    start_sharp_sums,
    start_spread,
    start_sums,
)
from sightline.triton.weights import LOG2_E


class Parts(NamedTuple):
    """What splits leave behind. `rows` is B H M."""

    spreads: Any  # (splits, 3, rows): shift, largest score and normaliser
    sums: Any  # (splits, 3, rows): shift, normaliser (or sum of sharp weights), sum of rounded weights
    value_sums: Any  # (splits, rows, Dv)
    rows: Any
    splits: Any
    split_keys: Any  # keys of a split, a multiple of the key tile


@triton.jit
def set_up_split(problem, variant: tl.constexpr, parts, units, program):
    """(split, rows) of a program."""
    split = program % parts.splits
    unit = program // parts.splits % units
    return split, set_up_rows(problem, variant, unit, program // parts.splits // units)


@triton.jit
def keys_of_split(variant: tl.constexpr, parts, rows, split):
    """The key range of a split."""
    first = split * parts.split_keys
    return part_of_range(visible_range(variant, rows), first, first + parts.split_keys)


@triton.jit
def measure_split(problem, parts, units, variant: tl.constexpr):
    """The first sweep of re-weighting over one split."""
    split, rows = set_up_split(problem, variant, parts, units, tl.program_id(0))
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    factors = row_factors(problem, variant, rows, queries)
    keys = keys_of_split(variant, parts, rows, split)
    spread = measure_range(
        problem, variant, keys, rows, None, factors.factor, queries, start_spread(variant, rows), None
    )
    target = parts.spreads + split.to(tl.int64) * 3 * parts.rows + rows.index
    tl.store(target, spread.shift, mask=rows.live)
    tl.store(target + parts.rows, spread.largest, mask=rows.live)
    tl.store(target + 2 * parts.rows, spread.normalizer, mask=rows.live)


@triton.jit
def merge_spreads(variant: tl.constexpr, parts, rows):
    """What all splits know of the rows' weights."""
    merged = start_spread(variant, rows)
    shift = merged.shift
    largest = merged.largest
    normalizer = merged.normalizer
    for split in tl.range(0, parts.splits):
        source = parts.spreads + tl.cast(split, tl.int64) * 3 * parts.rows + rows.index
        part_shift = tl.load(source)
        largest = tl.maximum(largest, tl.load(source + parts.rows))
        part_normalizer = tl.load(source + 2 * parts.rows)
        if not variant.shifted:
            normalizer = normalizer + part_normalizer
        else:
            raised = tl.maximum(shift, part_shift)
            base = finite_shift(raised)
            normalizer = normalizer * tl.exp2((shift - base) * LOG2_E)
            normalizer = normalizer + part_normalizer * tl.exp2((part_shift - base) * LOG2_E)
            shift = raised
    return Spread(shift, largest, normalizer, merged.normalizer_lost)


@triton.jit
def attend_split(problem, parts, units, repairs, variant: tl.constexpr):
    """Plain attention, or the second sweep of re-weighting, over one split."""
    program = tl.program_id(0)
    if variant.safe and tl.load(repairs + program) == 0:
        return
    split, rows = set_up_split(problem, variant, parts, units, program)
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    factors = row_factors(problem, variant, rows, queries)
    keys = keys_of_split(variant, parts, rows, split)
    if variant.reweight:
        peaks = find_peaks(problem, variant, factors.visible, merge_spreads(variant, parts, rows))
        sums = start_sharp_sums(variant, rows)
        sums = sharpen_range(problem, variant, keys, rows, None, factors.factor, queries, peaks, sums, None, 0)
        shift = peaks.shift
        total = sums.weight_sum
    else:
        sums = start_sums(problem, variant, rows, False)
        sums = attend_range(problem, variant, keys, rows, None, factors.factor, queries, sums)
        shift = sums.shift
        total = sums.normalizer
    target = parts.sums + split.to(tl.int64) * 3 * parts.rows + rows.index
    tl.store(target, shift, mask=rows.live)
    tl.store(target + parts.rows, total, mask=rows.live)
    tl.store(target + 2 * parts.rows, sums.rounded, mask=rows.live)
    columns = tl.arange(0, variant.block_value_width)
    row_start = (split.to(tl.int64) * parts.rows + rows.index) * variant.value_width
    live = rows.live[:, None] & (columns < variant.value_width)[None, :]
    tl.store(parts.value_sums + row_start[:, None] + columns[None, :], sums.value_sum, mask=live)
    if not variant.safe:
        tl.store(repairs + program, (is_finite(sums.value_sum) == 0).to(tl.int32))


@triton.jit
def load_part_values(variant: tl.constexpr, parts, rows, split):
    """The weighted values of a split, (rows, Dv) in fp32."""
    columns = tl.arange(0, variant.block_value_width)
    row_start = (tl.cast(split, tl.int64) * parts.rows + rows.index) * variant.value_width
    live = rows.live[:, None] & (columns < variant.value_width)[None, :]
    return tl.load(parts.value_sums + row_start[:, None] + columns[None, :], mask=live, other=0.0)


@triton.jit
def merge_splits(problem, parts, output, log_normalizer, saved, units, variant: tl.constexpr):
    """Adds up what the splits left, divides and stores. `saved` is not written: decoding saves nothing for backward."""
    program = tl.program_id(0)
    rows = set_up_rows(problem, variant, program % units, program // units)
    if variant.reweight:
        queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
        factors = row_factors(problem, variant, rows, queries)
        spread = merge_spreads(variant, parts, rows)
        peaks = find_peaks(problem, variant, factors.visible, spread)
        nothing = start_sharp_sums(variant, rows)
        total = nothing.weight_sum
        rounded = nothing.rounded
        values = nothing.value_sum
        for split in tl.range(0, parts.splits):
            source = parts.sums + tl.cast(split, tl.int64) * 3 * parts.rows + rows.index
            total += tl.load(source + parts.rows)
            rounded += tl.load(source + 2 * parts.rows)
            values += load_part_values(variant, parts, rows, split)
        zeros = nothing.response
        merged = SharpSums(total, zeros, rounded, zeros, zeros, values, zeros, zeros)
        store_sharp_rows(problem, variant, output, log_normalizer, saved, rows, spread.normalizer, peaks, merged)
    else:
        start = start_sums(problem, variant, rows, True)
        shift = start.shift
        total = start.normalizer
        rounded = start.rounded
        values = start.value_sum
        for split in tl.range(0, parts.splits):
            source = parts.sums + tl.cast(split, tl.int64) * 3 * parts.rows + rows.index
            part_shift = tl.load(source)
            raised = tl.maximum(shift, part_shift)
            if not variant.shifted:
                # Exponents of two, which scale the weighted values and not the normaliser.
                decay = tl.exp2(shift - raised)
                growth = tl.exp2(part_shift - raised)
                total = total + tl.load(source + parts.rows)
            else:
                base = finite_shift(raised)
                decay = tl.exp2((shift - base) * LOG2_E)
                growth = tl.exp2((part_shift - base) * LOG2_E)
                total = total * decay + tl.load(source + parts.rows) * growth
            shift = raised
            rounded = rounded * decay + tl.load(source + 2 * parts.rows) * growth
            part = load_part_values(variant, parts, rows, split)
            # An infinite value whose weight has shrunk to nothing is gone.
            part = tl.where(growth[:, None] == 0.0, 0.0, part * growth[:, None])
            values = tl.where(decay[:, None] == 0.0, 0.0, values * decay[:, None]) + part
        sums = Sums(shift, total, start.normalizer_lost, rounded, values, start.normalizer_lost)
        store_plain_rows(problem, variant, output, log_normalizer, saved, rows, sums)
