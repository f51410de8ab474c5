"""The counter-based hash that decides which attention weights dropout keeps, the same bits on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF


def _lowbias32(x: Tensor) -> Tensor:
    """The 32-bit mixer "lowbias32" (C. Wellons, "Prospecting for Hash Functions", 2018) on uint32 values held in int64.

    An int64 product wraps modulo 2^64, so that its low 32 bits are those of the uint32 product.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def dropout_keep(
    seed: Tensor | int,
    probability: float,
    batch: int,
    heads: int,
    rows: Tensor,
    keys: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which weights survive dropout, as a bool tensor (B, H, R, N).

    `seed` is one int64 (a tensor with one element, or a number), `rows` (R,) the indices of the query rows in their
    tensor, `keys` the number N of keys. A weight is kept when a hash of (seed, b, h, i, j) is at least
    probability * 2^32, so the decision depends on nothing but these numbers: not on tiles, threads or the chosen rows.

    >>> import torch
    >>> keep = dropout_keep(7, 0.25, batch=1, heads=2, rows=torch.arange(64), keys=64)
    >>> keep.shape, bool((keep.double().mean() - 0.75).abs() < 0.02)
    (torch.Size([1, 2, 64, 64]), True)
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row = rows.to(device=device, dtype=torch.int64).view(1, 1, -1, 1)
    key = torch.arange(keys, device=device)

    stream = _lowbias32((_lowbias32(seed & _UINT32) + ((seed >> 32) & _UINT32)) & _UINT32)
    row_bits = _lowbias32((stream + head) & _UINT32)
    row_bits = _lowbias32((row_bits + row) & _UINT32)
    key_bits = _lowbias32((key + 0x9E3779B9) & _UINT32)
    return _lowbias32(row_bits ^ key_bits) >= int(probability * 2**32)
