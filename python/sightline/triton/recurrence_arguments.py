"""What keeps a raw call of the recurrence's Triton operators within its memory, as csrc/torch/recurrence.cpp checks it.

The public function has checked more, and says it better (_recurrence_checks.py). Nothing here reads from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT_NAMES = "expected float32, float16 or bfloat16"


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gain: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_log_normalizer: Tensor | None,
    initial_memory: Tensor | None,
) -> None:
    """Raise RuntimeError for tensors of `sightline::additive_recurrence_triton` that do not fit each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value), ("key_gain", key_gain)):
        _expect(tensor is None or tensor.dim() == 4, f"{name}: expected 4 axes")
    for option in (key, value, key_gain, key_mask, cu_seqlens, initial_log_normalizer, initial_memory):
        _expect(option is None or option.device == query.device, f"options: expected tensors on {query.device}")
    batch, heads, length, width = query.shape
    key_heads = key.shape[1]
    _expect(key.dtype == value.dtype == query.dtype, "key and value: expected the dtype of query")
    _expect(query.dtype in _FLOATS, f"query: {_FLOAT_NAMES}")
    _expect(key.shape[0] == value.shape[0] == batch, "key and value: expected the batch of query")
    _expect(key.shape[2] == value.shape[2] == length, "key and value: expected the rows of query")
    _expect(value.shape[1] == key_heads, "value: expected the heads of key")
    _expect(key.shape[3] == width, "key: expected the width of query")
    _expect(width > 0 and value.shape[3] > 0, "query and value: expected a width of at least 1")
    _expect(key_heads > 0 and heads % key_heads == 0, "query: expected a multiple of the key heads")
    if key_gain is not None:
        _expect(key_gain.shape == key.shape, "key_gain: expected the shape of key")
        _expect(key_gain.dtype in _FLOATS, f"key_gain: {_FLOAT_NAMES}")
    if key_mask is not None:
        fits = key_mask.dtype == torch.bool and key_mask.shape == (batch, length)
        _expect(fits, "key_mask: expected bool (B, N)")
    if cu_seqlens is not None:
        fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and batch == 1
        _expect(fits, "cu_seqlens: expected shape (documents + 1,) and a batch of 1")
        _expect(cu_seqlens.dtype in (torch.int32, torch.int64), "cu_seqlens: expected int32 or int64")
    given = (initial_log_normalizer is None) == (initial_memory is None)
    _expect(given, "initial_log_normalizer and initial_memory: expected both or none")
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_state("initial_log_normalizer", initial_log_normalizer, (sequences, key_heads, width))
    check_state("initial_memory", initial_memory, (sequences, key_heads, width, value.shape[3]))


def check_state(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """The same for a part of a state, or its gradient."""
    fits = tensor is None or (tensor.dtype == torch.float32 and tensor.shape == shape)
    _expect(fits, f"{name}: expected float32 with one entry per sequence, key head, channel (and value column)")


def check_gradients(
    gradients: tuple[Any, ...], output: tuple[int, ...], memory: tuple[int, ...], query: Tensor
) -> None:
    """The same for the gradients of the outputs, given the shapes of output and memory."""
    grad_output, grad_log_normalizer, grad_memory = gradients
    for gradient in gradients:
        _expect(gradient is None or gradient.device == query.device, f"options: expected tensors on {query.device}")
    fits = grad_output.shape == output and grad_output.dtype == query.dtype
    _expect(fits, "grad_output: expected (B, H, N, Dv) in the dtype of query")
    check_state("grad_log_normalizer", grad_log_normalizer, memory[:3])
    check_state("grad_memory", grad_memory, memory)
