"""The gradient of a float attn_mask: the score gradients, summed over the axes along which the mask was broadcast.

Work: one program per tile of the mask. It walks every batch entry, head and query tile that shares the tile's entries,
and of the key tiles those that the rows see, recomputes the score gradients and stores their sum once, so that the
order of the sum is fixed and the memory is that of the mask alone. A mask of full shape costs one more pass of three
products; a mask of one entry one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.gradients import differentiate, load_row_gradients
from sightline.triton.key_range import visible_range
from sightline.triton.products import dot
from sightline.triton.rows import load_rows, set_up_rows
from sightline.triton.scores import key_factors, load_keys, score_tile


@triton.jit
def mask_gradient(
    problem,
    grad_output,
    table,
    table_stride,
    target,
    mask_batches,
    mask_heads,
    mask_row_tiles,
    mask_key_tiles,
    shared_batches,
    shared_heads,
    shared_row_tiles,
    shared_key_tiles,
    ROWS_SHARED: tl.constexpr,
    KEYS_SHARED: tl.constexpr,
    variant: tl.constexpr,
):
    """target: the gradient, an fp32 Mask; `mask_*` count its tiles per axis, `shared_*` what each of them sums over."""
    program = tl.program_id(0)
    mask_key_tile = program % mask_key_tiles
    mask_row_tile = program // mask_key_tiles % mask_row_tiles
    mask_head = program // mask_key_tiles // mask_row_tiles % mask_heads
    mask_batch = program // mask_key_tiles // mask_row_tiles // mask_heads
    total = tl.full((variant.row_tile, variant.key_tile), 0.0, tl.float32)
    for batch in tl.range(mask_batch, mask_batch + shared_batches):
        for head in tl.range(mask_head, mask_head + shared_heads):
            for row_tile in tl.range(mask_row_tile, mask_row_tile + shared_row_tiles):
                rows = set_up_rows(problem, variant, batch * problem.heads + head, row_tile)
                queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
                upstream = load_rows(grad_output, rows, variant.value_width, variant.block_value_width)
                state = load_row_gradients(table, table_stride, variant, rows)
                seen = visible_range(variant, rows)
                first_tile = tl.maximum(mask_key_tile, seen.start // variant.key_tile)
                last_tile = tl.minimum(mask_key_tile + shared_key_tiles, tl.cdiv(seen.stop, variant.key_tile))
                for key_tile in tl.range(first_tile, last_tile):
                    keys = key_tile * variant.key_tile + tl.arange(0, variant.key_tile)
                    key_vectors = load_keys(
                        problem.key, rows, keys, problem.keys, True, variant.head_width, variant.block_width
                    )
                    value_vectors = load_keys(
                        problem.value, rows, keys, problem.keys, True, variant.value_width, variant.block_value_width
                    )
                    scores = score_tile(
                        problem,
                        variant,
                        True,
                        rows,
                        state.factor,
                        queries,
                        keys,
                        key_vectors,
                        key_factors(problem, variant, True, rows, keys, key_vectors),
                    )
                    products = dot(upstream, tl.trans(value_vectors))
                    _, gradient = differentiate(problem, variant, True, rows, state, keys, scores, products)
                    total += tl.where(rows.live[:, None], gradient, 0.0)
    query = mask_row_tile * variant.row_tile + tl.arange(0, variant.row_tile)
    keys = mask_key_tile * variant.key_tile + tl.arange(0, variant.key_tile)
    base = target.data + mask_batch.to(tl.int64) * target.batch_stride + mask_head.to(tl.int64) * target.head_stride
    if ROWS_SHARED and KEYS_SHARED:
        tl.store(base, tl.sum(total))
    elif ROWS_SHARED:
        tl.store(base + keys.to(tl.int64) * target.key_stride, tl.sum(total, 0), mask=keys < problem.keys)
    elif KEYS_SHARED:
        tl.store(base + query.to(tl.int64) * target.row_stride, tl.sum(total, 1), mask=query < problem.queries)
    else:
        pointers = base + query.to(tl.int64)[:, None] * target.row_stride + keys.to(tl.int64)[None, :]
        live = (query < problem.queries)[:, None] & (keys < problem.keys)[None, :]
        tl.store(pointers, total, mask=live)
