"""Weighted attention, backward (MATH.md sections 1 and 2): gradients of query, and of key and value.

Work: `query_gradients` has one program per tile of query rows of one head and walks the key tiles that these rows
see; `key_gradients` has one per tile of keys of one key head and walks the query tiles that see these keys, over all
query heads of the group. So every number is summed by one program in a fixed order: no atomics, and the same bits
from run to run. The price is two products computed twice (seven instead of five).

Programs whose result is not finite run again in a second launch, as in forward. The score gradient meets Q with the
row's factor c_i / |q_i| and K with 1 / |k_j|, both in fp32 before rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.descriptors import describe_keys, describe_rows, load_key_tile, load_row_tiles, load_value_tile
from sightline.triton.gradients import differentiate, load_row_gradients, project_out, times_factor
from sightline.triton.key_range import KeyRange, visible_range
from sightline.triton.products import add_scaled_product, dot, is_finite, scaled_to_fit
from sightline.triton.rows import find_document, load_rows, row_factors, set_up_rows, store_rows
from sightline.triton.scores import finish_scores, key_factors, load_keys, score_tile


class KeyGradients(NamedTuple):
    """Gradients of a tile of keys and values, dK still without 1 / |k_j|."""

    key_sum: Any
    value_sum: Any


@triton.jit
def gather_query_gradient(
    problem,
    variant: tl.constexpr,
    MASKED: tl.constexpr,
    start,
    stop,
    rows,
    descriptors,
    state,
    queries,
    upstream,
    total,
):
    """total + dS K / |k| over the key tiles from `start` to `stop`."""
    for first_key in tl.range(start, stop, variant.key_tile):
        keys = first_key + tl.arange(0, variant.key_tile)
        key_vectors = load_key_tile(problem, variant, MASKED, descriptors, rows, first_key)
        value_vectors = load_value_tile(problem, variant, MASKED, descriptors, rows, first_key)
        key_factor = key_factors(problem, variant, MASKED, rows, keys, key_vectors)
        scores = score_tile(problem, variant, MASKED, rows, state.factor, queries, keys, key_vectors, key_factor)
        products = dot(upstream, tl.trans(value_vectors))
        _, gradient = differentiate(problem, variant, MASKED, rows, state, keys, scores, products)
        if variant.normalize_qk:
            gradient = times_factor(gradient, key_factor[None, :], variant.safe)
        gradient, undo = scaled_to_fit(gradient, variant)
        total = add_scaled_product(total, gradient, key_vectors, undo, variant)
    return total


@triton.jit
def query_gradients(
    problem, grad_output, table, table_stride, grad_query, scale_terms, units, tiles, repairs, variant: tl.constexpr
):
    """grad_query (B, H, M, D); scale_terms (B, H, M), what each row adds to the gradient of its scale, or None."""
    program = tl.program_id(0)
    if variant.safe and tl.load(repairs + program) == 0:
        return
    rows = set_up_rows(problem, variant, program % units, tiles - 1 - program // units)
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    upstream = load_rows(grad_output, rows, variant.value_width, variant.block_value_width)
    state = load_row_gradients(table, table_stride, variant, rows)
    keys = visible_range(variant, rows)
    # Before Triton 3.7 no device function may return None.
    descriptors = None
    if variant.descriptors:
        descriptors = describe_keys(problem, variant, rows)
    total = tl.full((variant.row_tile, variant.block_width), 0.0, tl.float32)
    if variant.masked_everywhere or variant.safe:
        total = gather_query_gradient(
            problem, variant, True, keys.start, keys.stop, rows, descriptors, state, queries, upstream, total
        )
    else:
        if variant.window_left or variant.documents:
            total = gather_query_gradient(
                problem, variant, True, keys.start, keys.full_start, rows, descriptors, state, queries, upstream, total
            )
        total = gather_query_gradient(
            problem, variant, False, keys.full_start, keys.full_stop, rows, descriptors, state, queries, upstream, total
        )
        total = gather_query_gradient(
            problem, variant, True, keys.full_stop, keys.stop, rows, descriptors, state, queries, upstream, total
        )
    if not variant.safe:
        tl.store(repairs + program, (is_finite(total) == 0).to(tl.int32))
    # Loaded again: kept, they would take registers from the loops.
    queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
    factors = row_factors(problem, variant, rows, queries)
    if scale_terms is not None:
        along = tl.sum(total * queries.to(tl.float32), 1)
        tl.store(scale_terms + rows.index, factors.unit * along, mask=rows.live)
    total = total * factors.factor[:, None]
    if variant.normalize_qk:
        total = project_out(total, queries, factors.inverse_norm)
    store_rows(grad_query, rows, total, variant.head_width, variant.block_width)


@triton.jit
def query_range(problem, variant: tl.constexpr, batch, first_key):
    """The query tiles that see any of the keys of a tile, and those that see all of them, as a KeyRange of rows."""
    last_key = tl.minimum(first_key + variant.key_tile, problem.keys) - 1
    tile: tl.constexpr = variant.row_tile
    end = tl.cdiv(problem.queries, tile) * tile
    if variant.documents:
        begin_k = tl.load(problem.cu_seqlens_k)
        documents = problem.documents
        end_k = tl.load(problem.cu_seqlens_k + documents)
        some = (last_key >= begin_k) & (first_key < end_k)
        # The documents of the first and last key; empty ones between them hold no rows of interest and do no harm.
        first = tl.maximum(tl.minimum(first_key, end_k - 1), begin_k)
        last = tl.maximum(tl.minimum(last_key, end_k - 1), begin_k)
        first = find_document(problem.cu_seqlens_k, documents, problem.search_steps, first)
        last = find_document(problem.cu_seqlens_k, documents, problem.search_steps, last)
        following = tl.minimum(last + 1, documents)
        start = tl.where(some, tl.maximum(tl.load(problem.cu_seqlens_q + first), 0), 0) // tile * tile
        stop = tl.where(some, tl.minimum(tl.load(problem.cu_seqlens_q + following), problem.queries), 0)
        return KeyRange(start, start, start, stop)
    else:
        length = problem.keys
        if problem.key_lengths is not None:
            length = tl.load(problem.key_lengths + batch)
            length = tl.minimum(tl.maximum(length, 0), problem.keys).to(tl.int32)
        offset = length - problem.queries
        start = first_key * 0
        full_start = first_key * 0
        stop = start + problem.queries
        full_stop = start + end
        if variant.causal or variant.window_right:
            right = first_key * 0
            if not variant.causal:
                right = right + problem.window_right
            start = tl.maximum(start, first_key - right - offset) // tile * tile
            full_start = tl.cdiv(tl.maximum(full_start, last_key - right - offset), tile) * tile
        if variant.window_left:
            stop = tl.minimum(stop, last_key + problem.window_left - offset + 1)
            furthest = tl.maximum(first_key + problem.window_left - offset + 1, 0)
            full_stop = tl.minimum(full_stop, furthest // tile * tile)
        stop = tl.where(first_key < length, stop, 0)
        full_start = tl.where(last_key < length, full_start, end)
        full_start = tl.minimum(tl.maximum(full_start, start), tl.maximum(end, start))
        return KeyRange(start, full_start, tl.maximum(full_stop, full_start), stop)


@triton.jit
def gather_key_gradients(
    problem,
    variant: tl.constexpr,
    MASKED: tl.constexpr,
    start,
    stop,
    unit,
    keys,
    key_vectors,
    value_vectors,
    key_factor,
    grad_output,
    descriptors,
    table,
    table_stride,
    sums,
):
    """Adds what the query tiles from row `start` to row `stop` of one head give to a tile of keys."""
    key_sum = sums.key_sum
    value_sum = sums.value_sum
    for first_row in tl.range(start, stop, variant.row_tile):
        rows = set_up_rows(problem, variant, unit, first_row // variant.row_tile)
        queries, upstream = load_row_tiles(problem, variant, grad_output, descriptors, rows, first_row)
        state = load_row_gradients(table, table_stride, variant, rows)
        # The longer side of the tile first: from 64 on it suits the largest instructions of the tensor cores. And where
        # that is the keys, weights and gradients are operands of the products below as they come.
        if variant.key_tile >= variant.row_tile:
            products = tl.trans(dot(key_vectors, tl.trans(queries)))
            value_products = tl.trans(dot(value_vectors, tl.trans(upstream)))
        else:
            products = dot(queries, tl.trans(key_vectors))
            value_products = dot(upstream, tl.trans(value_vectors))
        scores = finish_scores(problem, variant, MASKED, rows, state.factor, keys, products, key_factor)
        weights, gradient = differentiate(problem, variant, MASKED, rows, state, keys, scores, value_products)
        weights, undo = scaled_to_fit(weights, variant)
        value_sum = add_scaled_product(value_sum, tl.trans(weights), upstream, undo, variant)
        gradient = times_factor(gradient, state.factor[:, None], variant.safe)
        gradient, undo = scaled_to_fit(gradient, variant)
        key_sum = add_scaled_product(key_sum, tl.trans(gradient), queries, undo, variant)
    return KeyGradients(key_sum, value_sum)


@triton.jit
def gather_of_group(
    problem,
    variant: tl.constexpr,
    batch,
    key_head,
    seen_by,
    keys,
    key_vectors,
    value_vectors,
    key_factor,
    grad_output,
    table,
    table_stride,
):
    """The gradients of a tile of keys from all query heads of its key head."""
    key_sum = tl.full((variant.key_tile, variant.block_width), 0.0, tl.float32)
    value_sum = tl.full((variant.key_tile, variant.block_value_width), 0.0, tl.float32)
    group = problem.heads // problem.key_heads
    first_unit = batch * problem.heads + key_head * group
    for unit in tl.range(first_unit, first_unit + group):
        sums = KeyGradients(key_sum, value_sum)
        descriptors = None
        if variant.descriptors:
            descriptors = describe_rows(problem, variant, grad_output, batch, unit - batch * problem.heads)
        if variant.safe or variant.masked_everywhere or variant.documents:
            sums = gather_key_gradients(
                problem,
                variant,
                True,
                seen_by.start,
                seen_by.stop,
                unit,
                keys,
                key_vectors,
                value_vectors,
                key_factor,
                grad_output,
                descriptors,
                table,
                table_stride,
                sums,
            )
        else:
            sums = gather_key_gradients(
                problem,
                variant,
                True,
                seen_by.start,
                tl.minimum(seen_by.full_start, seen_by.stop),
                unit,
                keys,
                key_vectors,
                value_vectors,
                key_factor,
                grad_output,
                descriptors,
                table,
                table_stride,
                sums,
            )
            sums = gather_key_gradients(
                problem,
                variant,
                False,
                seen_by.full_start,
                seen_by.full_stop,
                unit,
                keys,
                key_vectors,
                value_vectors,
                key_factor,
                grad_output,
                descriptors,
                table,
                table_stride,
                sums,
            )
            if variant.window_left:
                sums = gather_key_gradients(
                    problem,
                    variant,
                    True,
                    seen_by.full_stop,
                    seen_by.stop,
                    unit,
                    keys,
                    key_vectors,
                    value_vectors,
                    key_factor,
                    grad_output,
                    descriptors,
                    table,
                    table_stride,
                    sums,
                )
        key_sum = sums.key_sum
        value_sum = sums.value_sum
    return KeyGradients(key_sum, value_sum)


@triton.jit
def store_keys(heads, batch, key_head, keys, limit, values, width: tl.constexpr, block: tl.constexpr):
    """Round and store rows of a (B, Hk, N, width) tensor."""
    base = heads.data + batch.to(tl.int64) * heads.batch_stride + key_head.to(tl.int64) * heads.head_stride
    columns = tl.arange(0, block)
    pointers = base + keys.to(tl.int64)[:, None] * heads.row_stride + columns[None, :]
    live = (keys < limit)[:, None] & (columns < width)[None, :]
    tl.store(pointers, values.to(heads.data.dtype.element_ty), mask=live)


@triton.jit
def key_gradients(
    problem, grad_output, table, table_stride, grad_key, grad_value, key_units, repairs, variant: tl.constexpr
):
    """grad_key (B, Hk, N, D) and grad_value (B, Hk, N, Dv)."""
    program = tl.program_id(0)
    if variant.safe and tl.load(repairs + program) == 0:
        return
    unit = program % key_units
    batch = unit // problem.key_heads
    key_head = unit % problem.key_heads
    # Under causality the first keys are seen by most rows: they come first as they are.
    first_key = program // key_units * variant.key_tile
    keys = first_key + tl.arange(0, variant.key_tile)
    rows = set_up_rows(problem, variant, batch * problem.heads + key_head * (problem.heads // problem.key_heads), 0)
    key_vectors = load_keys(problem.key, rows, keys, problem.keys, True, variant.head_width, variant.block_width)
    value_vectors = load_keys(
        problem.value, rows, keys, problem.keys, True, variant.value_width, variant.block_value_width
    )
    key_factor = key_factors(problem, variant, True, rows, keys, key_vectors)
    seen_by = query_range(problem, variant, batch, first_key)
    sums = gather_of_group(
        problem,
        variant,
        batch,
        key_head,
        seen_by,
        keys,
        key_vectors,
        value_vectors,
        key_factor,
        grad_output,
        table,
        table_stride,
    )
    if not variant.safe:
        finite = is_finite(sums.key_sum) & is_finite(sums.value_sum)
        tl.store(repairs + program, (finite == 0).to(tl.int32))
    gradient = sums.key_sum
    if variant.normalize_qk:
        # Loaded again: kept, they would take registers from the loop.
        key_vectors = load_keys(problem.key, rows, keys, problem.keys, True, variant.head_width, variant.block_width)
        gradient = times_factor(gradient, key_factor[:, None], True)
        gradient = project_out(gradient, key_vectors, key_factor)
    store_keys(grad_key, batch, key_head, keys, problem.keys, gradient, variant.head_width, variant.block_width)
    store_keys(
        grad_value, batch, key_head, keys, problem.keys, sums.value_sum, variant.value_width, variant.block_value_width
    )
