"""The operators `sightline::attention` and `sightline::attention_backward`, whose kernels and schemas are native."""

from __future__ import annotations

import torch
from torch import _C

from sightline.ops.rules import Kernels, register_rules

ATTENTION = torch.ops.sightline.attention.default
ATTENTION_BACKWARD = torch.ops.sightline.attention_backward.default

_CPU_KERNEL = _C.DispatchKeySet(_C.DispatchKey.CPU)

_library = torch.library.Library("sightline", "FRAGMENT")
_kernels = Kernels(
    ("cpu",),
    lambda *arguments: ATTENTION.redispatch(_CPU_KERNEL, *arguments),
    lambda *arguments: ATTENTION_BACKWARD.redispatch(_CPU_KERNEL, *arguments),
)

call_attention = register_rules(_library, "attention", _kernels).call
