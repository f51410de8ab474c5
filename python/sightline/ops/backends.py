"""Which implementation computes a call. Chosen in Python, where torch.compile can guard the choice."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from sightline.ops.library import cuda_architectures, cuda_library, isa_name, native_library

BACKENDS = ("auto", "native", "triton", "reference")

_TRITON_REASON = "the Triton kernels are not part of this version"

# A constant to torch.compile: tracing must not look at the file system.
_HAS_KERNELS = native_library().loaded
_MISCONFIGURED = native_library().misconfigured

_warned_devices: set[str] = set()


def backend_status() -> dict[str, tuple[bool, str]]:
    """For every backend whether it is available here, and why or why not."""
    library = native_library()
    native = library.reason
    if library.loaded:
        cuda = cuda_library()
        decoding = f"CUDA decoding for {', '.join(cuda_architectures())}" if cuda.loaded else f"no CUDA: {cuda.reason}"
        native = f"CPU kernels, instruction set {isa_name()}; {decoding}"
    return {
        "native": (library.loaded, native),
        "triton": (False, _TRITON_REASON),
        "reference": (True, "the formulas in PyTorch, on any device"),
    }


def requested_backend(backend: str) -> str:
    """`backend`, and for "auto" the environment variable SIGHTLINE_BACKEND where it is set.

    Raises ValueError for an unknown SIGHTLINE_BACKEND.
    """
    if backend == "auto":
        backend = os.environ.get("SIGHTLINE_BACKEND", "auto")
        if backend not in BACKENDS:
            raise ValueError(f"SIGHTLINE_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def choose_backend(query: Tensor, backend: str, decode_refusal: str | None = None) -> str:
    """ "native" or "reference" for this query; `backend` as in `sightline.attention`, already checked.

    decode_refusal: why the CUDA decoding kernel does not take this call, where the query is on a CUDA device. Falling
    back to the reference on a device or in an installation without kernels warns once; float64 is the reference's own.

    Raises ValueError for an unknown SIGHTLINE_BACKEND or SIGHTLINE_ISA, NotImplementedError for a backend that cannot
    take this query.
    """
    backend = requested_backend(backend)
    if backend == "reference":
        return backend
    if _MISCONFIGURED:
        raise ValueError(native_library().reason)
    if backend == "triton":
        raise NotImplementedError(f"backend: 'triton' is not available: {_TRITON_REASON}; use 'auto'")
    device = query.device.type
    has_kernels = _HAS_KERNELS and device in ("cpu", "meta")
    if query.dtype != torch.float64 and has_kernels:
        return "native"
    if backend == "native":
        if query.dtype == torch.float64:
            raise NotImplementedError("backend: 'native' has no float64 kernels; use 'reference' or 'auto'")
        if device == "cpu":
            reason = native_library().reason
        elif decode_refusal is not None:
            reason = f"the decoding kernel is all there is for device {device!r}, and {decode_refusal}"
        else:
            reason = f"there are no native kernels for device {device!r}"
        raise NotImplementedError(f"backend: 'native' is not available: {reason}; use 'reference' or 'auto'")
    if query.dtype != torch.float64 and not torch.compiler.is_compiling() and device not in _warned_devices:
        _warned_devices.add(device)
        reason = native_library().reason if device == "cpu" else f"there are no kernels for device {device!r}"
        warnings.warn(
            f"sightline falls back to its PyTorch reference, which is slow: {reason}. backend='reference' asks for it "
            "without this warning.",
            stacklevel=3,
        )
    return "reference"
