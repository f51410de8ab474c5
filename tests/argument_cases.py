"""Arguments of `sightline.attention` that are right, and what it says when one of them is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sightline as sl

B, H, HK, M, N, D, DV = 2, 4, 2, 5, 7, 8, 3

OPTIONAL_TENSORS = [
    "key_lengths",
    "key_mask",
    "attn_mask",
    "alibi_slopes",
    "sinks",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "value_weights",
    "key_segments",
]

PER_NAME = {
    "key": torch.rand(B, HK, N, D),
    "value": torch.rand(B, HK, N, DV),
    "key_lengths": torch.tensor([N, N]),
    "key_mask": torch.ones(B, N, dtype=torch.bool),
    "attn_mask": torch.zeros(M, N),
    "alibi_slopes": torch.rand(H),
    "sinks": torch.rand(H),
    "scale": torch.rand(H),
    "value_weights": torch.rand(B, HK, N),
    "key_segments": torch.zeros(B, N, dtype=torch.int64),
}


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments that are right, then the changes."""
    right = {"query": torch.rand(B, H, M, D), "key": torch.rand(B, HK, N, D), "value": torch.rand(B, HK, N, DV)}
    return right | changes


def refusal(error: type[Exception], **changes: Any) -> str:
    """What `sl.attention` says to these changes; it must raise this very type and go on working afterwards."""
    with pytest.raises(error) as caught:
        sl.attention(**arguments(**changes))
    assert type(caught.value) is error
    assert sl.attention(**arguments()).shape == (B, H, M, DV)
    return str(caught.value)


def packed(**changes: Any) -> dict[str, Any]:
    offsets_q, offsets_k = torch.tensor([0, 2, M], dtype=torch.int32), torch.tensor([0, 3, N], dtype=torch.int32)
    right = {
        "query": torch.rand(1, H, M, D),
        "key": torch.rand(1, HK, N, D),
        "value": torch.rand(1, HK, N, DV),
        "cu_seqlens_q": offsets_q,
        "cu_seqlens_k": offsets_k,
    }
    return right | changes
