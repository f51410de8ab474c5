"""1 / |k_j| of all keys, once per call (normalize_qk, MATH.md section 1).

Work: one program per tile of keys of one key head. Forward and the gradient of the queries meet a key once for every
tile of rows that sees it: computed there, its norm would cost a pass over the key in registers each time. Decoding
reads keys once and takes their norms as they come.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.rows import inverse_norms
from sightline.triton.scores import load_keys


class KeyHead(NamedTuple):
    """Whose keys a program reads."""

    batch: Any
    key_head: Any


@triton.jit
def measure_keys(problem, norms, key_units, variant: tl.constexpr):
    """norms (B, Hk, N) fp32; a tile is that of the kernels over rows."""
    program = tl.program_id(0)
    unit = program % key_units
    owner = KeyHead(unit // problem.key_heads, unit % problem.key_heads)
    keys = program // key_units * variant.row_tile + tl.arange(0, variant.row_tile)
    vectors = load_keys(problem.key, owner, keys, problem.keys, True, variant.head_width, variant.block_width)
    target = norms + unit.to(tl.int64) * problem.keys + keys
    tl.store(target, inverse_norms(vectors), mask=keys < problem.keys)
