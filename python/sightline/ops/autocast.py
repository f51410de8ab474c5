"""What autocast does to the inputs of attention: query, key and value are cast, states, sinks and masks are not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast casts nothing on a device; of device types that have none, meta, as well."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def autocast_dtype(query: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives query, key and value now; None where it leaves them alone."""
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)
