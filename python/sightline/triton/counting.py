"""n_i where attn_mask decides it: how many keys each row sees, counted tile by tile of the mask.

Work: one program per tile of query rows of one head, as in forward. A key_mask alone needs a prefix sum only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.key_range import visible_range
from sightline.triton.rows import set_up_rows
from sightline.triton.scores import load_mask, visible_entries


@triton.jit
def count_visible_keys(problem, counts, units, variant: tl.constexpr):
    """counts (B, H, M) int32."""
    program = tl.program_id(0)
    rows = set_up_rows(problem, variant, program % units, program // units)
    keys_seen = visible_range(variant, rows)
    count = tl.zeros(rows.query.shape, tl.int32)
    for first_key in tl.range(keys_seen.start, keys_seen.stop, variant.key_tile):
        keys = first_key + tl.arange(0, variant.key_tile)
        visible = visible_entries(problem, variant, rows, keys)
        if not variant.bool_mask:
            visible = visible & (load_mask(problem, rows, keys).to(tl.float32) != float("-inf"))
        count += tl.sum(visible.to(tl.int32), 1)
    tl.store(counts + rows.index, count, mask=rows.live)
