"""Which implementation computes a call. Chosen in Python, where torch.compile can guard the choice."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from sightline.ops.library import cuda_architectures, cuda_library, isa_name, native_library

BACKENDS = ("auto", "native", "triton", "reference")

_OLDEST_TRITON = (3, 4)
_TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
_TRITON_WIDTH = 256
_OLDEST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: Ampere

# Triton decides between its compiler and its interpreter when kernels are defined, once per process.
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")

# Constants to torch.compile: tracing must not look at the file system.
_HAS_KERNELS = native_library().loaded
_MISCONFIGURED = native_library().misconfigured
_LIBRARY_STATE = native_library().reason

_warned_devices: set[str] = set()

# Whether the variable is set is asked in every call, for which os.environ, a mapping in Python, takes longer than the
# argument checks. CPython keeps its dictionary in `_data`; without it the mapping itself does.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = "SIGHTLINE_BACKEND" if _ENVIRONMENT is os.environ else os.environ.encodekey("SIGHTLINE_BACKEND")


def _triton_version() -> str | None:
    for distribution in _TRITON_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _why_no_triton() -> str | None:
    """Why no tensor can be computed by Triton in this installation, or None. Does not import it."""
    oldest = ".".join(map(str, _OLDEST_TRITON))
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a folder of that name on the path is a package without origin
        return f"Triton is not installed (at least {oldest} is needed)"
    version = _triton_version()
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_TRITON:
        return f"Triton {version} is too old (at least {oldest} is needed)"
    if not _HAS_KERNELS:
        return f"its operators take their schema from the native library: {_LIBRARY_STATE}"
    return None


_WHY_NO_TRITON = _why_no_triton()
_capabilities: dict[torch.device, tuple[int, int] | None] = {}
_TRITON_DEVICES = ("cuda", "cpu", "meta") if INTERPRETS_TRITON else ("cuda", "meta")


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for others, and where there is none but in the tensor's name."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _known_capability(device: torch.device) -> tuple[int, int] | None:
    """_capability, asked once per device; a compiler folds the question itself and must not see the dictionary."""
    if torch.compiler.is_compiling():
        return _capability(device)
    if device not in _capabilities:
        _capabilities[device] = _capability(device)
    return _capabilities[device]


def _why_not_triton(query: Tensor, value_width: int) -> str | None:
    """Why Triton does not compute a call with this query and this width of value, or None."""
    if _WHY_NO_TRITON is not None:
        return _WHY_NO_TRITON
    if query.dtype == torch.float64:
        return "it has no float64 kernels"
    device = query.device.type
    if device not in _TRITON_DEVICES:
        interpreter = "; TRITON_INTERPRET=1, set before sightline is imported, runs it in Triton's interpreter"
        return f"query is on device {device!r}, not 'cuda'{interpreter if device == 'cpu' else ''}"
    if device == "cuda":
        capability = _known_capability(query.device)
        if capability is not None and capability < _OLDEST_CAPABILITY:
            oldest, own = (".".join(map(str, numbers)) for numbers in (_OLDEST_CAPABILITY, capability))
            return f"its kernels need compute capability {oldest} or newer, and {query.device} has {own}"
    if query.shape[3] > _TRITON_WIDTH or value_width > _TRITON_WIDTH:
        widths = f"{query.shape[3]} (query) and {value_width} (value)"
        return f"its kernels take head widths up to {_TRITON_WIDTH}, got {widths}"
    return None


def backend_status() -> dict[str, tuple[bool, str]]:
    """For every backend whether it is available here, and why or why not."""
    library = native_library()
    native = library.reason
    if library.loaded:
        cuda = cuda_library()
        decoding = f"CUDA decoding for {', '.join(cuda_architectures())}" if cuda.loaded else f"no CUDA: {cuda.reason}"
        native = f"CPU kernels, instruction set {isa_name()}; {decoding}"
    if _WHY_NO_TRITON is not None:
        triton = (False, _WHY_NO_TRITON)
    elif torch.cuda.is_available():
        triton = (True, f"kernels for CUDA devices, Triton {_triton_version()}")
    elif INTERPRETS_TRITON:
        triton = (True, f"kernels on the CPU in the interpreter of Triton {_triton_version()}, which is slow")
    else:
        triton = (False, "no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU in Triton's interpreter")
    return {
        "native": (library.loaded, native),
        "triton": triton,
        "reference": (True, "the formulas in PyTorch, on any device"),
    }


def requested_backend(backend: str) -> str:
    """`backend`, and for "auto" the environment variable SIGHTLINE_BACKEND where it is set.

    Raises ValueError for an unknown SIGHTLINE_BACKEND.
    """
    if backend == "auto" and _VARIABLE in _ENVIRONMENT:
        backend = os.environ["SIGHTLINE_BACKEND"]
        if backend not in BACKENDS:
            raise ValueError(f"SIGHTLINE_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def choose_backend(query: Tensor, backend: str, value_width: int = 1, decode_refusal: str | None = None) -> str:
    """ "native", "triton", "decode" or "reference" for this query; `backend` as in `sightline.attention`, checked.

    "auto" takes the environment variable SIGHTLINE_BACKEND where it is set, else Triton for tensors on CUDA and the
    native kernels for those on the CPU. "native" on CUDA is the decoding kernel; `decode_refusal` says why it does not
    take this call. Falling back to the reference on a device or in an installation without kernels warns once;
    float64 is the reference's own.

    Raises ValueError for an unknown SIGHTLINE_BACKEND or SIGHTLINE_ISA, NotImplementedError for a backend that cannot
    take this query with values of this width.
    """
    backend = requested_backend(backend)
    if backend == "reference":
        return backend
    if _MISCONFIGURED:
        raise ValueError(_LIBRARY_STATE)
    device = query.device.type
    if backend == "triton" or device == "cuda":
        reason = _why_not_triton(query, value_width)
        if reason is None and backend != "native":
            return "triton"
        if backend == "triton":
            raise NotImplementedError(f"backend: 'triton' is not available: {reason}; use 'auto'")
    if backend == "native" and device == "cuda" and decode_refusal is None and query.dtype != torch.float64:
        return "decode"
    has_kernels = _HAS_KERNELS and device in ("cpu", "meta")
    if query.dtype != torch.float64 and has_kernels:
        return "native"
    if device == "cpu":
        reason = _LIBRARY_STATE
    elif decode_refusal is not None:
        reason = f"the decoding kernel is all there is for device {device!r}, and {decode_refusal}"
    elif device != "cuda":
        reason = f"there are no native kernels for device {device!r}"
    if backend == "native":
        if query.dtype == torch.float64:
            raise NotImplementedError("backend: 'native' has no float64 kernels; use 'reference' or 'auto'")
        raise NotImplementedError(f"backend: 'native' is not available: {reason}; use 'reference' or 'auto'")
    if query.dtype != torch.float64:
        _warn_of_fallback(device, reason)
    return "reference"


def choose_recurrence_backend(query: Tensor, backend: str) -> str:
    """ "native", "triton" or "reference" for this query; `backend` as in `sightline.additive_recurrence`, checked.

    The rules and errors are those of `choose_backend`, but the native kernels are for the CPU alone and the Triton
    kernels take every width.
    """
    backend = requested_backend(backend)
    if backend == "reference":
        return backend
    if _MISCONFIGURED:
        raise ValueError(_LIBRARY_STATE)
    device = query.device.type
    why_not = None
    if backend == "triton" or device == "cuda":
        why_not = _why_not_triton(query[..., :1], 1)
        if why_not is None and backend != "native":
            return "triton"
        if backend == "triton":
            raise NotImplementedError(f"backend: 'triton' is not available: {why_not}; use 'auto'")
    if query.dtype == torch.float64:
        if backend == "native":
            raise NotImplementedError("backend: 'native' has no float64 kernels; use 'reference' or 'auto'")
        return "reference"
    if _HAS_KERNELS and device in ("cpu", "meta"):
        return "native"
    if device == "cpu":
        reason: str | None = _LIBRARY_STATE
    elif why_not is not None and backend != "native":
        reason = why_not
    else:
        reason = f"the additive recurrence has no native kernels for device {device!r}"
    if backend == "native":
        raise NotImplementedError(f"backend: 'native' is not available: {reason}; use 'reference' or 'auto'")
    _warn_of_fallback(device, reason)
    return "reference"


def _warn_of_fallback(device: str, reason: str | None) -> None:
    if torch.compiler.is_compiling() or device in _warned_devices:
        return
    _warned_devices.add(device)
    warnings.warn(
        f"sightline falls back to its PyTorch reference, which is slow: {reason}. backend='reference' asks for it "
        "without this warning.",
        stacklevel=4,
    )
