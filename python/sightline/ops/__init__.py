"""The operators of namespace `sightline`: native library, fake kernels, autograd, autocast, vmap, backends."""

from __future__ import annotations

from sightline.ops.backends import backend_status, choose_backend
from sightline.ops.library import available_isas, isa_name, native_library

__all__ = ["available_isas", "backend_status", "choose_backend", "isa_name", "native_library"]

if native_library().loaded:
    from sightline.ops import attention as attention  # registers the Python half of the operators
