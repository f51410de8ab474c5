"""Calls of the raw operators of the additive recurrence that would read out of bounds, and what each backend says."""

from __future__ import annotations

from typing import Any

import torch

B, H, HK, N, DK, DV = 2, 4, 2, 9, 8, 6


def arguments(operator: Any, **changes: Any) -> tuple[Any, ...]:
    """Arguments of the operator or its backward that are right, then the changes, by the names of the schema."""
    given = {
        "query": torch.randn(B, H, N, DK),
        "key": torch.randn(B, HK, N, DK),
        "value": torch.randn(B, HK, N, DV),
        "causal": True,
        "scale": 0.5,
        "output_final_state": True,
        "needs_gain_gradient": True,
        "needs_state_gradient": True,
        "grad_output": torch.randn(B, H, N, DV),
    } | changes
    return tuple(given.get(argument.name) for argument in operator._schema.arguments)


def _state(*, z: tuple[int, ...] = (B, HK, DK), memory: tuple[int, ...] = (B, HK, DK, DV), dtype: Any = torch.float32):
    return {"initial_log_normalizer": torch.zeros(z, dtype=dtype), "initial_memory": torch.zeros(memory, dtype=dtype)}


_ENTRIES = "expected float32 with one entry per sequence, key head, channel"
# What was changed, and the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"query": torch.zeros(H, N, DK)}, "query: expected 4 axes"),
    "dtype": ({"value": torch.zeros(B, HK, N, DV).half()}, "key and value: expected the dtype of query"),
    "float64": (
        {name: torch.zeros(B, heads, N, 8).double() for name, heads in (("query", H), ("key", HK), ("value", HK))},
        "query: expected float32, float16 or bfloat16",
    ),
    "batch of the key": ({"key": torch.zeros(1, HK, N, DK)}, "key and value: expected the batch of query"),
    "batch of the value": ({"value": torch.zeros(1, HK, N, DV)}, "key and value: expected the batch of query"),
    "batch of both": (
        {"key": torch.zeros(1, HK, N, DK), "value": torch.zeros(1, HK, N, DV)},
        "key and value: expected the batch of query",
    ),
    "rows": ({"value": torch.zeros(B, HK, 5, DV)}, "key and value: expected the rows of query"),
    "heads": ({"value": torch.zeros(B, 1, N, DV)}, "value: expected the heads of key"),
    "width": ({"key": torch.zeros(B, HK, N, 4)}, "key: expected the width of query"),
    "no width": ({"value": torch.zeros(B, HK, N, 0)}, "query and value: expected a width of at least 1"),
    "group": (
        {"key": torch.zeros(B, 3, N, DK), "value": torch.zeros(B, 3, N, DV)},
        "query: expected a multiple of the key heads",
    ),
    "gain": ({"key_gain": torch.zeros(B, HK, N, 4)}, "key_gain: expected the shape of key"),
    "dtype of the gain": ({"key_gain": torch.zeros(B, HK, N, DK).double()}, "key_gain: expected float32, float16"),
    "mask": ({"key_mask": torch.ones(B, 3, dtype=torch.bool)}, "key_mask: expected bool (B, N)"),
    "dtype of the mask": ({"key_mask": torch.ones(B, N)}, "key_mask: expected bool (B, N)"),
    "documents of a batch": (
        {"cu_seqlens": torch.tensor([0, N], dtype=torch.int32)},
        "cu_seqlens: expected shape (documents + 1,) and a batch of 1",
    ),
    "half a state": (
        {"initial_memory": torch.zeros(B, HK, DK, DV)},
        "initial_log_normalizer and initial_memory: expected both or none",
    ),
    "normaliser": (_state(z=(1, HK, DK)), f"initial_log_normalizer: {_ENTRIES}"),
    "memory": (_state(memory=(1, HK, DK, DV)), f"initial_memory: {_ENTRIES}"),
    "dtype of the state": (_state(dtype=torch.float16), f"initial_log_normalizer: {_ENTRIES}"),
}
REFUSED_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "group": REFUSED["group"],
    "grad_output": (
        {"grad_output": torch.zeros(B, H, N, 4)},
        "grad_output: expected (B, H, N, Dv) in the dtype of query",
    ),
    "dtype of grad_output": (
        {"grad_output": torch.zeros(B, H, N, DV).half()},
        "grad_output: expected (B, H, N, Dv) in the dtype of query",
    ),
    "gradient of the normaliser": (
        {"grad_log_normalizer": torch.zeros(1, HK, DK)},
        f"grad_log_normalizer: {_ENTRIES}",
    ),
    "gradient of the memory": ({"grad_memory": torch.zeros(1, HK, DK, DV)}, f"grad_memory: {_ENTRIES}"),
}
