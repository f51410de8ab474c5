"""From scores to their gradients on a tile (backward formulas of MATH.md sections 1 and 2), for all backward kernels.

`prepare_rows` runs once per row and leaves in memory what the kernels over key tiles and query tiles then load: one
column per quantity, so that a tile of rows reads each of them from consecutive addresses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.dropout import kept
from sightline.triton.products import dot
from sightline.triton.rows import NORM_FLOOR, count_visible, load_rows, row_factors, set_up_rows
from sightline.triton.weights import LOG2_E, positive_part, reweigh, weigh_with_derivative

# Columns of the table of rows: five, and five more under re-weighting.
PLAIN_COLUMNS = 5
REWEIGHT_COLUMNS = 10


class RowGradients(NamedTuple):
    """What a row contributes to the gradients of its scores. The last five only under re-weighting."""

    factor: Any  # c_i / |q_i|
    shift: Any
    inverse_normalizer: Any
    delta: Any
    log_gradient: Any  # g_i
    mean: Any
    inverse_peak: Any  # 0 where the row is flat
    inverse_weight_sum: Any  # 0 where the row is flat
    response_factor: Any  # p / (m S)
    coupling: Any  # (O / n) E - g / Z, subtracted from every visible df


@triton.jit
def prepare_rows(
    problem,
    output,
    grad_output,
    grad_log_normalizer,
    saved,
    table,
    table_stride,
    sink_terms,
    units,
    variant: tl.constexpr,
):
    """table (columns, B H M); sink_terms (B, H, M), what each row adds to the gradient of its sink, or None."""
    program = tl.program_id(0)
    rows = set_up_rows(problem, variant, program % units, program // units)
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    factors = row_factors(problem, variant, rows, queries)
    upstream = load_rows(grad_output, rows, variant.value_width, variant.block_value_width)
    result = load_rows(output, rows, variant.value_width, variant.block_value_width)
    # Added up as <do, v> is: a row that attends to one key alone has o = v, and its gradient is then exactly 0.
    lanes = tl.arange(0, variant.row_tile)
    diagonal = lanes[:, None] == lanes[None, :]
    delta = tl.sum(tl.where(diagonal, dot(upstream, tl.trans(result)), 0.0), 1)
    saved_width = 6 if variant.reweight else 2
    columns = saved.rows + rows.index * saved_width
    shift = tl.load(columns)
    normalizer = tl.load(columns + 1)
    empty = normalizer == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, normalizer))
    log_gradient = tl.zeros_like(delta)
    if grad_log_normalizer is not None:
        log_gradient = tl.where(empty, 0.0, tl.load(grad_log_normalizer + rows.index))
    target = table + rows.index
    tl.store(target, factors.factor, mask=rows.live)
    tl.store(target + table_stride, shift, mask=rows.live)
    tl.store(target + 2 * table_stride, inverse, mask=rows.live)
    tl.store(target + 3 * table_stride, delta, mask=rows.live)
    tl.store(target + 4 * table_stride, log_gradient, mask=rows.live)
    if variant.reweight:
        peak = tl.load(columns + 3)
        weight_sum = tl.load(columns + 4)
        widths = tl.arange(0, variant.block_value_width)
        pointers = saved.responses + (rows.index * variant.value_width)[:, None] + widths[None, :]
        responses = tl.load(pointers, mask=(widths < variant.value_width)[None, :], other=0.0)
        # E_i of MATH.md, section 2: two sums in one order, for the same reason.
        wide = upstream.to(tl.float32)
        along = tl.sum(wide * result.to(tl.float32), 1)
        row_sum = problem.power / peak * (tl.sum(wide * responses, 1) - along * tl.load(columns + 5))
        sharp = (weight_sum != 0.0) & (empty == 0)
        exempt = factors.visible <= problem.exempt_rows
        share = tl.where(exempt, 0.0, problem.offset) / tl.where(sharp, factors.visible, 1.0)
        per_sum = 1.0 / tl.where(sharp, weight_sum, 1.0)
        tl.store(target + 5 * table_stride, tl.load(columns + 2), mask=rows.live)
        tl.store(target + 6 * table_stride, tl.where(sharp, 1.0 / peak, 0.0), mask=rows.live)
        tl.store(target + 7 * table_stride, tl.where(sharp, per_sum, 0.0), mask=rows.live)
        tl.store(target + 8 * table_stride, tl.where(sharp, problem.power / peak * per_sum, 0.0), mask=rows.live)
        tl.store(target + 9 * table_stride, share * row_sum - log_gradient * inverse, mask=rows.live)
    if sink_terms is not None:
        sink = tl.load(problem.sinks + rows.head)
        share = tl.exp2((sink - shift) * LOG2_E) * inverse
        # The normaliser of a row that sees no key is the sink's constant and has no gradient.
        alone = count_visible(problem, variant, rows) == 0.0
        tl.store(sink_terms + rows.index, tl.where(alone, 0.0, share * (log_gradient - delta)), mask=rows.live)


@triton.jit
def load_row_gradients(table, table_stride, variant: tl.constexpr, rows):
    """The table's entries of a tile of rows; all 0 past the end, which makes such rows contribute nothing."""
    source = table + rows.index
    factor = tl.load(source, mask=rows.live, other=0.0)
    shift = tl.load(source + table_stride, mask=rows.live, other=0.0)
    inverse = tl.load(source + 2 * table_stride, mask=rows.live, other=0.0)
    delta = tl.load(source + 3 * table_stride, mask=rows.live, other=0.0)
    log_gradient = tl.load(source + 4 * table_stride, mask=rows.live, other=0.0)
    if variant.reweight:
        return RowGradients(
            factor,
            shift,
            inverse,
            delta,
            log_gradient,
            tl.load(source + 5 * table_stride, mask=rows.live, other=0.0),
            tl.load(source + 6 * table_stride, mask=rows.live, other=0.0),
            tl.load(source + 7 * table_stride, mask=rows.live, other=0.0),
            tl.load(source + 8 * table_stride, mask=rows.live, other=0.0),
            tl.load(source + 9 * table_stride, mask=rows.live, other=0.0),
        )
    else:
        return RowGradients(factor, shift, inverse, delta, log_gradient, delta, delta, delta, delta, delta)


@triton.jit
def differentiate(problem, variant: tl.constexpr, MASKED: tl.constexpr, rows, state, keys, scores, value_products):
    """(attention weights for dV, gradients of the scores) of a tile; `value_products` are <do_i, v_j>."""
    if variant.dropout:
        keep = kept(rows.dropout_key, keys, problem.dropout_threshold)
        value_products = tl.where(keep, value_products * problem.dropout_scale, 0.0)
    plain, slope = weigh_with_derivative(scores, state.shift[:, None], variant)
    weights = plain * state.inverse_normalizer[:, None]
    # First what may cancel exactly.
    gradient = value_products - state.delta[:, None] + state.log_gradient[:, None]
    gradient = gradient * state.inverse_normalizer[:, None]
    if variant.reweight:
        flat = (state.inverse_weight_sum == 0.0)[:, None]
        excess = positive_part(plain - state.mean[:, None]) * state.inverse_peak[:, None]
        response, sharp = reweigh(excess, problem.power, variant.whole_power)
        sharp_gradient = response * state.response_factor[:, None] * (value_products - state.delta[:, None])
        weights = tl.where(flat, weights, sharp * state.inverse_weight_sum[:, None])
        gradient = tl.where(flat, gradient, sharp_gradient - state.coupling[:, None])
    gradient = gradient * slope
    if variant.softcap:
        ratio = scores / problem.softcap
        gradient = gradient * (1.0 - ratio * ratio)
    if variant.dropout:
        weights = tl.where(keep, weights * problem.dropout_scale, 0.0)
    if MASKED:
        invisible = scores == float("-inf")
        weights = tl.where(invisible, 0.0, weights)
        gradient = tl.where(invisible, 0.0, gradient)
    return weights, gradient


@triton.jit
def times_factor(tile, factor, SAFE: tl.constexpr):
    """A tile times a broadcast factor, which may be NaN for rows or keys that an entry of 0 has no part in."""
    if SAFE:
        return tl.where(tile == 0.0, 0.0, tile * factor)
    else:
        return tile * factor


@triton.jit
def project_out(gradient, vectors, inverse_norm):
    """Through the normalisation x / |x|: takes off the part along x. Nothing flows where the norm is at its floor."""
    wide = vectors.to(tl.float32)
    floored = tl.sqrt(tl.sum(wide * wide, 1)) < NORM_FLOOR
    along = tl.sum(gradient * wide, 1) * inverse_norm * inverse_norm
    return tl.where(floored[:, None], 0.0, gradient - wide * along[:, None])
