"""Compile Triton kernels for GPUs that this machine does not have, and read what they use.

The kernels are launched by the library itself on memory that is never read: a stand-in for Triton's driver names the
target, and each launch compiles and stops there. So what is measured has the tiles, warps and specialisations of a real
call. tools/triton_resources.py and tools/recurrence_resources.py say what is called.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import driver

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# By target, the bytes of shared memory that one block may use; of AMD's chips the local data share.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
}


def is_amd(target: str) -> bool:
    return target.startswith("gfx")


def capability(target: str) -> int:
    """The compute capability of an NVIDIA target, as Triton writes it."""
    return int(target.removeprefix("sm_"))


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses."""

    target: str
    kernel: str
    case: str  # the weighting; of the recurrence, the order
    dtype: str
    width: int
    tile: str
    registers: int  # of a thread; of AMD's chips vector and accumulation registers together
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    products: str = ""  # the instructions that multiply matrices
    bulk_loads: int = 0  # instructions of the tensor memory accelerator
    split_loops: int = 0  # loops whose work has warps of its own
    effective: bool = True  # whether what the tile asks for is in the code

    @property
    def fits(self) -> bool:
        return self.effective and self.spilled == 0 and self.shared <= SHARED_MEMORY[self.target]


class Target:
    """Stands in for Triton's driver: names a target and owns no device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.name, 64) if is_amd(self.name) else GPUTarget("cuda", capability(self.name), 32)

    def get_current_device(self) -> str:
        return self.name  # compiled kernels are kept by device

    def get_current_stream(self, device: str = "") -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


Keep = Callable[[str, Any, Any], None]


_reports: dict[str, str] = {}  # what ptxas said of a kernel, by the hash that Triton gives it


class Listening:
    """Stands in for `subprocess` where Triton calls ptxas, and keeps what ptxas says.

    Triton's own call, since its options differ from version to version; 3.4 cannot print what ptxas says, as 3.6 can.
    """

    def __init__(self) -> None:
        self.said = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, command: Sequence[str], **options: Any) -> Any:
        done = subprocess.run(command, **options)
        self.said += Path(options["stderr"].name).read_text()
        return done


@contextlib.contextmanager
def listening() -> Iterator[Listening]:
    ears = Listening()
    compiler.subprocess = ears
    try:
        yield ears
    finally:
        compiler.subprocess = subprocess


class CompileOnly:
    """A kernel whose launch compiles it and hands its name, its last argument (the variant) and what came out on."""

    def __init__(self, kernel: Any, keep: Keep, wanted: Callable[[str, Any], bool]) -> None:
        self.kernel, self.keep, self.wanted = kernel, keep, wanted

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            name, variant = self.kernel.fn.__name__, arguments[-1]
            if self.wanted(name, variant):
                with listening() as ears:
                    compiled = self.kernel.warmup(*arguments, grid=grid, **options)
                if ears.said:  # nothing for a kernel that was compiled before
                    _reports[compiled.hash] = ears.said
                self.keep(name, variant, compiled)

        return compile_it


@contextlib.contextmanager
def compiling_only(
    target: str,
    module: Any,
    kernels: Sequence[str],
    keep: Keep,
    wanted: Callable[[str, Any], bool] = lambda name, variant: True,
) -> Iterator[None]:
    """Launches of these kernels from this module compile for the target and go to `keep`, those that are wanted."""
    driver.set_active(Target(target))
    originals = {name: getattr(module, name) for name in kernels}
    for name, kernel in originals.items():
        setattr(module, name, CompileOnly(kernel, keep, wanted))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(module, name, kernel)


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """Triton's cache in an empty folder, so that every kernel passes the compiler that is installed now."""
    named = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="sightline-kernels-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if named is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = named


def registers_and_spills(compiled: Any, target: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread: as ptxas reports them, or as AMD's assembly states them.

    Of a kernel that was compiled under `compiling_only`, and not taken from Triton's cache.
    """
    if is_amd(target):
        return _stated(compiled.asm["amdgcn"])
    report = _reports[compiled.hash]
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas: no usage in its report:\n{report}")
    return int(registers[1]), sum(map(int, spills))


def _stated(assembly: str) -> tuple[int, int]:
    """Private memory holds what was spilled, and nothing else: the kernels have no arrays of their own."""
    found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")]
    if None in found:
        raise RuntimeError(f"no usage in the assembly:\n{assembly[-4000:]}")
    registers, private = (int(match[1]) for match in found if match is not None)
    return registers, private


def products(compiled: Any) -> str:
    """The instructions by which a kernel multiplies matrices."""
    if "amdgcn" in compiled.asm:
        return "mfma" if "v_mfma_" in compiled.asm["amdgcn"] else ""
    kinds = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync.aligned"}
    return " and ".join(kind for kind, instruction in kinds.items() if instruction in compiled.asm["ptx"])


def bulk_loads(compiled: Any) -> int:
    return compiled.asm.get("ptx", "").count("cp.async.bulk.tensor")


def split_loops(compiled: Any) -> int:
    return compiled.asm["ttgir"].count("warp_specialize(")
