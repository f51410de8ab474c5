"""From products to scores: factors, bias, ALiBi, softcap and visibility, on a tile of rows by keys.

An invisible entry becomes -inf, for which every weight function gives exactly 0, so that the mask acts after phi
(MATH.md section 1) and a NaN of an invisible key is selected away. A tile that all its rows see as a whole takes the
path with MASKED = False, which compares nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.products import dot
from sightline.triton.rows import inverse_norms
from sightline.triton.weights import hyperbolic_tangent


@triton.jit
def load_keys(heads, rows, keys, limit, MASKED: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """Rows of a key or value tensor as they are stored, (keys, block); zero past the end where MASKED."""
    base = heads.data + rows.batch.to(tl.int64) * heads.batch_stride + rows.key_head.to(tl.int64) * heads.head_stride
    columns = tl.arange(0, block)
    pointers = base + keys.to(tl.int64)[:, None] * heads.row_stride + columns[None, :]
    if width != block:
        mask = (columns < width)[None, :]
        if MASKED:
            mask = mask & (keys < limit)[:, None]
        return tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=(keys < limit)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def key_factors(problem, variant: tl.constexpr, MASKED: tl.constexpr, rows, keys, key_vectors):
    """1 / |k_j| with normalize_qk, as measured before or from the vectors, else 1."""
    if variant.normalize_qk:
        if problem.inverse_key_norms is None:
            return inverse_norms(key_vectors)
        else:
            unit = rows.batch.to(tl.int64) * problem.key_heads + rows.key_head
            norms = problem.inverse_key_norms + unit * problem.keys + keys
            if MASKED:
                return tl.load(norms, mask=keys < problem.keys, other=0.0)
            else:
                return tl.load(norms)
    else:
        return tl.full((key_vectors.shape[0],), 1.0, tl.float32)


@triton.jit
def visible_entries(problem, variant: tl.constexpr, rows, keys):
    """Which entries of a (rows, keys) tile are visible; a float attn_mask is left to its reader."""
    visible = (keys[None, :] >= rows.first[:, None]) & (keys[None, :] <= rows.last[:, None])
    if problem.key_mask is not None:
        takes_part = tl.load(
            problem.key_mask
            + rows.batch.to(tl.int64) * problem.key_mask_batch_stride
            + keys.to(tl.int64) * problem.key_mask_key_stride,
            mask=keys < problem.keys,
            other=0,
        )
        visible = visible & (takes_part != 0)[None, :]
    if variant.bool_mask:
        visible = visible & (load_mask(problem, rows, keys) != 0)
    return visible


@triton.jit
def load_mask(problem, rows, keys):
    """attn_mask on a tile, as it is stored."""
    mask = problem.mask
    row_offset = (
        rows.batch.to(tl.int64) * mask.batch_stride
        + rows.head.to(tl.int64) * mask.head_stride
        + rows.query.to(tl.int64) * mask.row_stride
    )
    pointers = mask.data + row_offset[:, None] + (keys.to(tl.int64) * mask.key_stride)[None, :]
    return tl.load(pointers, mask=rows.live[:, None] & (keys < problem.keys)[None, :], other=0)


@triton.jit
def score_tile(
    problem, variant: tl.constexpr, MASKED: tl.constexpr, rows, factor, queries, keys, key_vectors, key_factor
):
    """Finished scores of a (rows, keys) tile; `factor` is that of RowFactors."""
    products = dot(queries, tl.trans(key_vectors))
    return finish_scores(problem, variant, MASKED, rows, factor, keys, products, key_factor)


@triton.jit
def finish_scores(problem, variant: tl.constexpr, MASKED: tl.constexpr, rows, factor, keys, products, key_factor):
    """The scores of a tile whose <q, k> are given."""
    scores = products * factor[:, None]
    if variant.normalize_qk:
        scores = scores * key_factor[None, :]
    bias = scores
    if problem.mask.data is not None and not variant.bool_mask:
        bias = load_mask(problem, rows, keys).to(tl.float32)
        scores = scores + bias
    if problem.alibi_slopes is not None:
        distance = tl.abs(rows.position[:, None] - keys[None, :]).to(tl.float32)
        scores = scores - rows.slope[:, None] * distance
    if variant.softcap:
        scores = problem.softcap * hyperbolic_tangent(scores / problem.softcap)
    if MASKED:
        visible = visible_entries(problem, variant, rows, keys)
        if problem.mask.data is not None and not variant.bool_mask:
            visible = visible & (bias != float("-inf"))
        scores = tl.where(visible, scores, float("-inf"))
    return scores
