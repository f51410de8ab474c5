"""Loading of libsightline.so, which holds the operators' schemas and CPU kernels, and of libsightline_cuda.so."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class NativeLibrary:
    """The native library, or the reason why there is none."""

    handle: ctypes.CDLL | None
    reason: str
    misconfigured: bool = False  # the user asked for what cannot be: no call may fall back to something else

    @property
    def loaded(self) -> bool:
        return self.handle is not None

    def text(self, function: str) -> str | None:
        """What a C function without arguments says; None for a null pointer."""
        if self.handle is None:
            return None
        call = getattr(self.handle, function)
        call.restype = ctypes.c_char_p
        answer = call()
        return None if answer is None else answer.decode()


_FOLDER = Path(__file__).parent.parent / "_lib"


@functools.cache
def native_library() -> NativeLibrary:
    """Load libsightline.so once. Where that fails the answer says why; a call that needs it raises."""
    path = _FOLDER / "libsightline.so"
    if not path.exists():
        return NativeLibrary(None, f"{path.name} was not built for this installation ({platform.machine()})")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return NativeLibrary(None, f"{path.name} does not load with torch {torch.__version__}: {error}")
    library = NativeLibrary(ctypes.CDLL(str(path)), "loaded")
    if library.text("sightline_isa_name") is None:
        return NativeLibrary(None, str(library.text("sightline_isa_error")), misconfigured=True)
    return library


def isa_name() -> str | None:
    """The instruction set of the CPU kernels: generic, avx2, avx512, avx512_bf16 or amx_bf16; None without them."""
    return native_library().text("sightline_isa_name")


def available_isas() -> list[str]:
    """The instruction sets that this machine can run, slowest first; one of them can be named in SIGHTLINE_ISA."""
    names = native_library().text("sightline_available_isas")
    return names.split(",") if names else []


@functools.cache
def cuda_library() -> NativeLibrary:
    """Load libsightline_cuda.so once, where torch has a CUDA device. Where that fails the answer says why."""
    path = _FOLDER / "libsightline_cuda.so"
    if not native_library().loaded:
        return NativeLibrary(None, native_library().reason)
    if not path.exists():
        return NativeLibrary(None, f"{path.name} was not built for this installation (no nvcc was found)")
    if torch.version.cuda is None:
        return NativeLibrary(None, f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        return NativeLibrary(None, "torch finds no CUDA device")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return NativeLibrary(None, f"{path.name} does not load with torch {torch.__version__}: {error}")
    library = NativeLibrary(ctypes.CDLL(str(path)), "loaded")
    problem = library.text("sightline_cuda_driver_problem")
    return library if problem is None else NativeLibrary(None, f"{path.name} cannot run: {problem}")


def cuda_architectures() -> list[str]:
    """The GPUs that libsightline_cuda.so has code for, as "90" (compute capability 9.0) or "100+" (10.0 and newer)."""
    names = cuda_library().text("sightline_cuda_architectures")
    return names.split(",") if names else []


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run code for one of `architectures`.

    Machine code runs on its own family from its own member on, portable code on everything newer.

    >>> runs_on(["80", "90"], (8, 9)), runs_on(["80", "90"], (12, 0)), runs_on(["80", "100+"], (12, 0))
    (True, False, True)
    """
    number = capability[0] * 10 + capability[1]
    for architecture in architectures:
        built = int(architecture.rstrip("+"))
        if built <= number and (architecture.endswith("+") or built // 10 == capability[0]):
            return True
    return False
