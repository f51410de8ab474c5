"""sightline: long-context attention kernels you can see into."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sightline import nn, position
from sightline.attention import attention, attention_rows
from sightline.observe import AttentionStats, Observe
from sightline.recurrence import RecurrenceState, additive_recurrence
from sightline.weighting import LSSA, LSSAR, Reweight, Softmax, Softplus, weighting_from_dict

if TYPE_CHECKING:
    from sightline.hf import restore_attention, swap_attention

__version__ = "0.1.0"

__all__ = [
    "LSSA",
    "LSSAR",
    "AttentionStats",
    "Observe",
    "RecurrenceState",
    "Reweight",
    "Softmax",
    "Softplus",
    "additive_recurrence",
    "attention",
    "attention_rows",
    "nn",
    "position",
    "restore_attention",
    "swap_attention",
    "weighting_from_dict",
]

# Fetched on first use: `import sightline` does not import transformers.
_FROM_TRANSFORMERS = ("restore_attention", "swap_attention")
_NEED_TRANSFORMERS = ("hf", "models")


def __getattr__(name: str) -> Any:
    if name in _FROM_TRANSFORMERS:
        return getattr(importlib.import_module("sightline.hf"), name)
    if name in _NEED_TRANSFORMERS:
        return importlib.import_module(f"sightline.{name}")
    raise AttributeError(f"module 'sightline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NEED_TRANSFORMERS})
