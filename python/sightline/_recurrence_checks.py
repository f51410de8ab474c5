"""What `sightline.additive_recurrence` asks of its arguments, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline._checks import (
    _AUTOCAST_FLOATS,
    _BOOL,
    _FLOATS,
    _INT32,
    _LARGEST_SCALE,
    _NUMBER_TYPES,
    BACKENDS,
    _check_tensor,
    _refuse_backend,
    _shape,
    _short,
    _tuple,
    _wrong_type,
)
from sightline._size_checks import check_flag

_LARGEST_WIDTH = 512


def check_recurrence(
    query: Any,
    key: Any,
    value: Any,
    *,
    causal: Any,
    scale: Any,
    key_gain: Any,
    cu_seqlens: Any,
    key_mask: Any,
    initial_state: Any,
    output_final_state: Any,
    backend: Any,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Raise what `sightline.additive_recurrence` promises for these arguments.

    `autocast_dtype` is the dtype that autocast is about to give query, key and value, None where it does nothing.

    >>> import torch, sightline
    >>> sightline.additive_recurrence(torch.rand(1, 2, 5, 64), torch.rand(1, 2, 5, 80), torch.rand(1, 2, 5, 64))
    Traceback (most recent call last):
    ...
    ValueError: key: expected head width 64 as in query, got 80
    """
    _check_heads("query", query, None, autocast_dtype)
    _check_heads("key", key, query, autocast_dtype)
    _check_heads("value", value, query, autocast_dtype)
    _check_sizes(query.shape, key.shape, value.shape)
    for name, flag in (("causal", causal), ("output_final_state", output_final_state)):
        check_flag(name, flag)
    _check_scale(scale)
    if backend not in BACKENDS:
        _refuse_backend(backend)
    if key_gain is not None:
        _check_key_gain(key_gain, query, key.shape, autocast_dtype)
    if key_mask is not None:
        _check_key_mask(key_mask, query)
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, query)
    if initial_state is not None:
        sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        axis = "B" if cu_seqlens is None else "documents"
        _check_state(initial_state, query, axis, (sequences, key.shape[1], key.shape[3], value.shape[3]))


def _check_heads(name: str, tensor: Any, query: Tensor | None, autocast_dtype: torch.dtype | None) -> None:
    _check_tensor(name, tensor, _FLOATS if autocast_dtype is None else _AUTOCAST_FLOATS, query)
    if tensor.dim() != 4:
        axes = {"query": "(B, H, N, Dk)", "key": "(B, Hk, N, Dk)", "value": "(B, Hk, N, Dv)"}[name]
        raise ValueError(f"{name}: expected 4 axes {axes}, got shape {_shape(tensor)}")
    if query is not None and autocast_dtype is None and tensor.dtype != query.dtype:
        raise TypeError(f"{name}: expected dtype {_short(query.dtype)} as query, got {_short(tensor.dtype)}")


def _check_sizes(query: torch.Size, key: torch.Size, value: torch.Size) -> None:
    batch, heads, length, width = query
    for name, size in (("query", width), ("value", value[3])):
        if not 1 <= size <= _LARGEST_WIDTH:
            raise ValueError(f"{name}: expected head width from 1 to {_LARGEST_WIDTH}, got {size}")
    if heads < 1:
        raise ValueError(f"query: expected at least 1 head, got {heads}")
    for name, shape in (("key", key), ("value", value)):
        if shape[0] != batch:
            raise ValueError(f"{name}: expected batch size {batch} as in query, got {shape[0]}")
        if shape[2] != length:
            raise ValueError(f"{name}: expected {length} positions as in query, got {shape[2]}")
    if key[3] != width:
        raise ValueError(f"key: expected head width {width} as in query, got {key[3]}")
    if key[1] < 1 or heads % key[1] != 0:
        raise ValueError(f"key: expected a number of heads that divides the {heads} of query, got {key[1]}")
    if value[1] != key[1]:
        raise ValueError(f"value: expected {key[1]} heads as in key, got {value[1]}")


def _check_scale(scale: Any) -> None:
    if isinstance(scale, bool) or not isinstance(scale, _NUMBER_TYPES):
        raise _wrong_type("scale", "a finite number", scale)
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(f"scale: expected a finite number (at most {_LARGEST_SCALE} in size), got {scale}")


def _check_key_gain(key_gain: Any, query: Tensor, key: torch.Size, autocast_dtype: torch.dtype | None) -> None:
    own = query.dtype if autocast_dtype is None else autocast_dtype
    _check_tensor("key_gain", key_gain, {own: None, torch.float32: None}, query)
    if key_gain.shape != key:
        raise ValueError(f"key_gain: expected the shape of key, {_tuple(key)}, got {_shape(key_gain)}")


def _check_key_mask(key_mask: Any, query: Tensor) -> None:
    _check_tensor("key_mask", key_mask, _BOOL, query)
    batch, length = query.shape[0], query.shape[2]
    if key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] != length:
        raise ValueError(f"key_mask: expected shape (B, N) = ({batch}, {length}), got {_shape(key_mask)}")


def _check_documents(cu_seqlens: Any, query: Tensor) -> None:
    _check_tensor("cu_seqlens", cu_seqlens, _INT32, query)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (documents + 1,), got {_shape(cu_seqlens)}")
    if query.shape[0] != 1:
        raise ValueError(f"query: expected batch size 1 with packed documents (cu_seqlens), got {query.shape[0]}")


def _check_state(state: Any, query: Tensor, axis: str, sizes: tuple[int, int, int, int]) -> None:
    if not isinstance(state, tuple):
        raise _wrong_type("initial_state", "None or a RecurrenceState", state)
    if len(state) != 2:
        raise ValueError(
            f"initial_state: expected a RecurrenceState (log_normalizer, memory), got {len(state)} entries"
        )
    # What the kernels accumulate in; float64 is the reference's own.
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    expected = {"log_normalizer": sizes[:3], "memory": sizes}
    for (name, shape), tensor in zip(expected.items(), state, strict=True):
        _check_tensor(f"initial_state.{name}", tensor, {dtype: None}, query)
        if tuple(tensor.shape) != shape:
            symbols = f"({axis}, Hk, Dk)" if len(shape) == 3 else f"({axis}, Hk, Dk, Dv)"
            raise ValueError(f"initial_state.{name}: expected shape {symbols} = {_tuple(shape)}, got {_shape(tensor)}")
