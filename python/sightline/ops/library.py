"""Loading of libsightline.so, which holds the operators' schemas and CPU kernels."""

from __future__ import annotations

import ctypes
import functools
import platform
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


@functools.cache
def native_library() -> NativeLibrary:
    """Load libsightline.so once. Where that fails the answer says why; a call that needs it raises."""
    path = Path(__file__).parent.parent / "_lib" / "libsightline.so"
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
    """The instruction set that the CPU kernels use: "generic", "avx2", "avx512" or "avx512_bf16"; None without them."""
    return native_library().text("sightline_isa_name")


def available_isas() -> list[str]:
    """The instruction sets that this machine can run, narrowest first; one of them can be named in SIGHTLINE_ISA."""
    names = native_library().text("sightline_available_isas")
    return names.split(",") if names else []
