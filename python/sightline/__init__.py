"""sightline: long-context attention kernels you can see into."""

from __future__ import annotations

from sightline import nn, position
from sightline.attention import attention, attention_rows
from sightline.observe import AttentionStats, Observe
from sightline.recurrence import RecurrenceState, additive_recurrence
from sightline.weighting import LSSA, LSSAR, Reweight, Softmax, Softplus, weighting_from_dict

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
    "weighting_from_dict",
]
