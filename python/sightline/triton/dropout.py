"""Counter-based dropout: the hash of csrc/core/dropout.h, the same bits on every backend, forward and backward.

A weight (i, j) of head b H + h is kept when a hash of (seed, b, h, i, j) is at least p * 2^32. Three quarters of the
work depend on the row alone and are done once per row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix_bits(x):
    """lowbias32 (C. Wellons, "Prospecting for Hash Functions", 2018) on uint32 with wrap-around."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def dropout_row_keys(seed, head, query):
    """One uint32 per row; `head` is b H + h, `query` the row's index in its tensor."""
    seed_bits = tl.load(seed + tl.zeros_like(head)).to(tl.uint64, bitcast=True)
    low = mix_bits((seed_bits & 0xFFFFFFFF).to(tl.uint32))
    high = mix_bits(low + (seed_bits >> 32).to(tl.uint32))
    return mix_bits(mix_bits(high + head.to(tl.uint32)) + query.to(tl.uint32))


@triton.jit
def kept(row_keys, keys, threshold):
    """Which entries of a (rows, keys) tile survive; `threshold` is p * 2^32 as int64."""
    key_keys = mix_bits(keys.to(tl.uint32) + tl.full((), 0x9E3779B9, tl.uint32))
    return mix_bits(row_keys[:, None] ^ key_keys[None, :]) >= tl.cast(threshold, tl.uint32)
