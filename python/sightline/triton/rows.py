"""A tile of query rows: who they are, what they see, and the factors of their scores.

A unit of work owns the rows of one query head; with `packed_heads` (decoding) those of all query heads of one key head,
numbered rho = g * M + i, so that a tile of one-row decoding holds the whole group and keys are read once for it. Rows
past the end repeat the last one and are never stored, so that the bounds of a tile need no exception for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.dropout import dropout_row_keys

NORM_FLOOR = tl.constexpr(1e-6)
FIRST_UNSEEN = tl.constexpr(2**31 - 65536)  # far past every key, and far from overflow


class Rows(NamedTuple):
    """Vectors over the rows of a tile; `batch` and `key_head` are numbers."""

    batch: Any
    key_head: Any
    head: Any
    query: Any  # index in the query tensor
    live: Any
    index: Any  # of (batch, head, query), int64
    first: Any  # first and last key of the interval; last < first where there is none
    last: Any
    position: Any
    slope: Any
    dropout_key: Any


class RowFactors(NamedTuple):
    """What multiplies <q, k> / |k|: `factor` = c_i / |q_i|, `unit` the same without the scale."""

    visible: Any  # n_i in fp32, where the variant needs it
    inverse_norm: Any
    unit: Any
    factor: Any


@triton.jit
def find_document(cu_seqlens, documents, steps, rows):
    """The last d with cu_seqlens[d] <= row, for rows that lie in [cu_seqlens[0], cu_seqlens[documents])."""
    low = rows * 0
    high = low + documents
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens + middle) <= rows
        searching = high - low > 1
        low = tl.where(searching & below, middle, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit
def visible_interval(problem, variant: tl.constexpr, batch, query):
    """(first, last, position) of rows, positions counted from the start of the key tensor; as in core/visibility.h."""
    if variant.documents:
        begin_q = tl.load(problem.cu_seqlens_q)
        end_q = tl.load(problem.cu_seqlens_q + problem.documents)
        inside = (query >= begin_q) & (query < end_q)
        searched = tl.where(inside, query, begin_q)
        document = find_document(problem.cu_seqlens_q, problem.documents, problem.search_steps, searched)
        document = tl.where(inside, document, 0)
        following = tl.where(inside, document + 1, 0)
        # Offsets past the tensor are cut off: no access out of bounds whatever the caller passed.
        key_begin = tl.minimum(tl.maximum(tl.load(problem.cu_seqlens_k + document), 0), problem.keys)
        key_end = tl.minimum(tl.maximum(tl.load(problem.cu_seqlens_k + following), key_begin), problem.keys)
        query_end = tl.load(problem.cu_seqlens_q + following)
        position = query + (key_end - query_end)
        first = key_begin
        last = tl.where(inside, key_end - 1, -1)
    else:
        length = problem.keys
        if problem.key_lengths is not None:
            length = tl.load(problem.key_lengths + batch)
            length = tl.minimum(tl.maximum(length, 0), problem.keys).to(tl.int32)
        position = query + (length - problem.queries)
        first = tl.zeros_like(query)
        last = first + (length - 1)
    if variant.causal:
        last = tl.minimum(last, position)
    if variant.window_right:
        last = tl.minimum(last, position + problem.window_right)
    if variant.window_left:
        first = tl.maximum(first, position - problem.window_left)
    nothing = last < first
    return tl.where(nothing, FIRST_UNSEEN, first), tl.where(nothing, -1, last), position


@triton.jit
def set_up_rows(problem, variant: tl.constexpr, unit, tile):
    """The rows of a tile of a unit."""
    group = problem.heads // problem.key_heads
    if variant.packed_heads:
        batch = unit // problem.key_heads
        key_head = unit % problem.key_heads
        first_head = key_head * group
        count = group * problem.queries
    else:
        batch = unit // problem.heads
        first_head = unit % problem.heads
        key_head = first_head // group
        count = problem.queries
    rho = tile * variant.row_tile + tl.arange(0, variant.row_tile)
    live = rho < count
    rho = tl.minimum(rho, count - 1)
    if variant.packed_heads:
        head = first_head + rho // problem.queries
        query = rho % problem.queries
    else:
        head = first_head + rho * 0
        query = rho
    first, last, position = visible_interval(problem, variant, batch, query)
    slope = tl.zeros(rho.shape, tl.float32)
    if problem.alibi_slopes is not None:
        slope = tl.load(problem.alibi_slopes + head)
    dropout_key = rho
    if variant.dropout:
        dropout_key = dropout_row_keys(problem.dropout_seed, batch * problem.heads + head, query)
    index = (batch * problem.heads + head).to(tl.int64) * problem.queries + query
    return Rows(batch, key_head, head, query, live, index, first, last, position, slope, dropout_key)


@triton.jit
def load_rows(heads, rows, width: tl.constexpr, block: tl.constexpr):
    """The rows of a (B, H, M, width) tensor as they are stored, zero past their end."""
    offset = (
        rows.batch.to(tl.int64) * heads.batch_stride
        + rows.head.to(tl.int64) * heads.head_stride
        + rows.query.to(tl.int64) * heads.row_stride
    )
    columns = tl.arange(0, block)
    live = rows.live[:, None]
    if width != block:
        live = live & (columns < width)[None, :]
    return tl.load(heads.data + offset[:, None] + columns[None, :], mask=live, other=0.0)


@triton.jit
def store_rows(heads, rows, values, width: tl.constexpr, block: tl.constexpr):
    """The counterpart of load_rows, rounding to the dtype of the tensor."""
    offset = (
        rows.batch.to(tl.int64) * heads.batch_stride
        + rows.head.to(tl.int64) * heads.head_stride
        + rows.query.to(tl.int64) * heads.row_stride
    )
    columns = tl.arange(0, block)
    live = rows.live[:, None]
    if width != block:
        live = live & (columns < width)[None, :]
    pointers = heads.data + offset[:, None] + columns[None, :]
    tl.store(pointers, values.to(heads.data.dtype.element_ty), mask=live)


@triton.jit
def inverse_norms(vectors):
    """1 / |x| of each row of a tile, the norm floored; NaN stays NaN."""
    wide = vectors.to(tl.float32)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    return 1.0 / tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)


@triton.jit
def count_visible(problem, variant: tl.constexpr, rows):
    """n_i in fp32."""
    if problem.visible_counts is not None:
        visible = tl.load(problem.visible_counts + rows.index)
    else:
        first = tl.minimum(rows.first, rows.last + 1)
        if problem.visible_prefix is not None:
            prefix = problem.visible_prefix + rows.batch.to(tl.int64) * (problem.keys + 1)
            visible = tl.load(prefix + rows.last + 1) - tl.load(prefix + first)
        else:
            visible = rows.last + 1 - first
    return visible.to(tl.float32)


@triton.jit
def row_factors(problem, variant: tl.constexpr, rows, queries):
    """The factors of rows whose query vectors are given."""
    visible = tl.zeros(rows.query.shape, tl.float32)
    if variant.needs_count:
        visible = count_visible(problem, variant, rows)
    inverse_norm = tl.full(rows.query.shape, 1.0, tl.float32)
    if variant.normalize_qk:
        inverse_norm = inverse_norms(queries)
    unit = inverse_norm
    if variant.length_scale:
        unit = unit * tl.log(tl.where(visible < 1.0, 1.0, visible))
    if problem.scale_per_head is not None:
        factor = unit * tl.load(problem.scale_per_head + rows.head)
    else:
        factor = unit * problem.scale
    return RowFactors(visible, inverse_norm, unit, factor)
