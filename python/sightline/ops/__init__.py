"""The registered operators of namespace `sightline`: native library, fake kernels, autograd, vmap, backend choice."""

from __future__ import annotations

from sightline.ops.backends import (
    backend_status,
    choose_backend,
    choose_recurrence_backend,
    requested_backend,
)
from sightline.ops.decode import call_attention_decode, decode_refusal, decode_token, takes_decode_shortcut
from sightline.ops.library import available_isas, cuda_library, isa_name, native_library

__all__ = [
    "available_isas",
    "backend_status",
    "call_attention_decode",
    "choose_backend",
    "choose_recurrence_backend",
    "cuda_library",
    "decode_refusal",
    "decode_token",
    "isa_name",
    "native_library",
    "requested_backend",
    "takes_decode_shortcut",
]

if native_library().loaded:
    # Importing them registers the Python half of the operators.
    from sightline.ops import attention as attention
    from sightline.ops import recurrence as recurrence
    from sightline.ops import triton_attention as triton_attention
    from sightline.ops import triton_recurrence as triton_recurrence
