"""The operators `sightline::attention_triton` and `sightline::attention_triton_backward`, whose kernels are Triton's.

Their schemas are those of the native pair, taken from it, so that they stand in one place. Triton is imported by the
first call, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.ops.attention import ATTENTION, ATTENTION_BACKWARD
from sightline.ops.backends import INTERPRETS_TRITON
from sightline.ops.rules import Kernels, register_rules


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from sightline.triton.launch import attention

    return attention(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from sightline.triton.launch import attention_backward

    return attention_backward(*arguments)


# The interpreter alone reads the memory of a CPU.
_DISPATCH_KEYS = ("CUDA", "CPU") if INTERPRETS_TRITON else ("CUDA",)

_library = torch.library.Library("sightline", "FRAGMENT")
for _name, _model, _kernel in (
    ("attention_triton", ATTENTION, _forward),
    ("attention_triton_backward", ATTENTION_BACKWARD, _backward),
):
    _signature = str(_model._schema).removeprefix(_model._schema.name)
    _library.define(_name + _signature, tags=())
    for _key in _DISPATCH_KEYS:
        _library.impl(_name, _kernel, _key)

_kernels = Kernels(tuple(key.lower() for key in _DISPATCH_KEYS), _forward, _backward)
_operators = register_rules(_library, "attention_triton", _kernels)

ATTENTION_TRITON = _operators.attention
ATTENTION_TRITON_BACKWARD = _operators.attention_backward
call_attention_triton = _operators.call
