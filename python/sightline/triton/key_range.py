"""Which key tiles the rows of a tile see: any of them, and those that all of them see as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class KeyRange(NamedTuple):
    """Keys from `start` to `stop`; the tiles from `full_start` to `full_stop` are visible to every row as a whole."""

    start: Any
    full_start: Any
    full_stop: Any
    stop: Any


@triton.jit
def visible_range(variant: tl.constexpr, rows):
    """The key tiles that any of the rows sees."""
    start = tl.min(rows.first) // variant.key_tile * variant.key_tile
    stop = tl.max(rows.last) + 1
    seen_by_all = (tl.min(rows.last) + 1) // variant.key_tile * variant.key_tile
    if variant.window_left or variant.documents:
        end = tl.cdiv(stop, variant.key_tile) * variant.key_tile
        full_start = tl.maximum(tl.cdiv(tl.max(rows.first), variant.key_tile) * variant.key_tile, start)
        full_start = tl.minimum(full_start, tl.maximum(end, start))
    else:
        full_start = start
    return KeyRange(start, full_start, tl.maximum(full_start, seen_by_all), stop)


@triton.jit
def part_of_range(whole, first, last):
    """The tiles of a range that lie in [first, last); both are multiples of the key tile."""
    start = tl.maximum(whole.start, first)
    end = tl.maximum(last, start)
    full_start = tl.minimum(tl.maximum(whole.full_start, start), end)
    full_stop = tl.minimum(tl.maximum(whole.full_stop, full_start), end)
    return KeyRange(start, full_start, full_stop, tl.minimum(whole.stop, last))
