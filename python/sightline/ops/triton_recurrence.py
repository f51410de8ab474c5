"""The operators `sightline::additive_recurrence_triton` and its backward, whose kernels are Triton's.

Their schemas are those of the native pair, taken from it. Triton is imported by the first call, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.ops.backends import INTERPRETS_TRITON
from sightline.ops.recurrence import ADDITIVE_RECURRENCE, ADDITIVE_RECURRENCE_BACKWARD, register_recurrence_rules
from sightline.ops.rules import Kernels


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from sightline.triton.recurrence_launch import additive_recurrence

    return additive_recurrence(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from sightline.triton.recurrence_launch import additive_recurrence_backward

    return additive_recurrence_backward(*arguments)


# The interpreter alone reads the memory of a CPU.
_DISPATCH_KEYS = ("CUDA", "CPU") if INTERPRETS_TRITON else ("CUDA",)

_library = torch.library.Library("sightline", "FRAGMENT")
for _name, _model, _kernel in (
    ("additive_recurrence_triton", ADDITIVE_RECURRENCE, _forward),
    ("additive_recurrence_triton_backward", ADDITIVE_RECURRENCE_BACKWARD, _backward),
):
    _library.define(_name + str(_model._schema).removeprefix(_model._schema.name), tags=())
    for _key in _DISPATCH_KEYS:
        _library.impl(_name, _kernel, _key)

ADDITIVE_RECURRENCE_TRITON = torch.ops.sightline.additive_recurrence_triton.default
ADDITIVE_RECURRENCE_TRITON_BACKWARD = torch.ops.sightline.additive_recurrence_triton_backward.default

_kernels = Kernels(tuple(key.lower() for key in _DISPATCH_KEYS), _forward, _backward)
call_recurrence_triton = register_recurrence_rules(_library, "additive_recurrence_triton", _kernels)
