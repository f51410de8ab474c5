"""Which keys a query row may attend to, and how far away they are (MATH.md, "Positions and visibility")."""

from __future__ import annotations

import torch
from torch import Tensor


def _document_starts(cu_seqlens: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every index: its document, whether it lies in one at all, where that document starts, and its length."""
    # An empty document past the last offset takes what lies beyond, so that there is always one to look up.
    offsets = torch.cat([cu_seqlens, cu_seqlens[-1:]]).long()
    document = (torch.searchsorted(cu_seqlens.long(), index, right=True) - 1).clamp(min=0)
    inside = (index >= offsets[0]) & (index < offsets[-1])
    return document, inside, offsets[document], offsets[document + 1] - offsets[document]


def _packed_distance(rows: Tensor, keys: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """pos_i - j inside the documents, and whether i and j share one: both (1, 1, R, N)."""
    last_key = keys.numel()
    query_document, query_inside, query_start, queries = _document_starts(cu_seqlens_q, rows)
    key_document, key_inside, key_start, _ = _document_starts(cu_seqlens_k.clamp(0, last_key), keys)

    offsets = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).long().clamp(0, last_key)
    length = offsets[query_document + 1] - offsets[query_document]
    position = rows - query_start + length - queries
    distance = position.view(-1, 1) - (keys - key_start)
    same = (query_document.view(-1, 1) == key_document) & query_inside.view(-1, 1) & key_inside
    return distance.view(1, 1, *distance.shape), same.view(1, 1, *same.shape)


def visible_keys(
    rows: Tensor,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(visible, distance): j in V(i), and pos_i - j; both broadcastable to (B, H, R, N).

    `rows` (R,) are the indices of the query rows among `queries` = M, and `attn_mask` has been cut down to these rows.
    """
    key = torch.arange(keys, device=rows.device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        distance, visible = _packed_distance(rows, key, cu_seqlens_q, cu_seqlens_k)
    else:
        length = torch.tensor([keys], device=rows.device) if key_lengths is None else key_lengths.long().clamp(0, keys)
        length = length.view(-1, 1, 1, 1)
        distance = rows.view(-1, 1) + length - queries - key
        visible = (key < length).expand(distance.shape)

    left, right = window if window is not None else (None, None)
    if causal:
        visible = visible & (distance >= 0)
    if left is not None:
        visible = visible & (distance <= left)
    if right is not None:
        visible = visible & (distance >= -right)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
    return visible, distance
