"""Compile the Triton kernels without a GPU, say what they use, and fail where a register spills.

    python tools/triton_resources.py             every case below; writes docs/triton_resources.md
    python tools/triton_resources.py --check --arch 90 --dtype bf16 --width 64 128 --weighting lssar

The kernels are launched by the library itself on memory that is never read: a stand-in for the driver names the
architecture, and each launch compiles and stops there. So what is measured has the tiles, warps and specialisations of
a real call. The second launch of a kernel, which repairs programs with non-finite results, is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sightline as sl
from sightline.attention import weighting_scalars  # the operator takes a weighting as plain numbers
from sightline.triton import launch

PAGE = Path(__file__).parent.parent / "docs" / "triton_resources.md"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTINGS = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
WIDTHS = (64, 128, 256)
# Bytes of shared memory that one block may use.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 120: 101376}
TABLED = (80, 90)
KERNELS = (
    "attention_forward",
    "prepare_rows",
    "query_gradients",
    "key_gradients",
    "mask_gradient",
    "count_visible_keys",
    "measure_split",
    "attend_split",
    "merge_splits",
)
HEADS, KEY_HEADS, LENGTH = 8, 2, 4096


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses."""

    arch: int
    kernel: str
    weighting: str
    dtype: str
    width: int
    tile: str
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_MEMORY[self.arch]


class Architecture:
    """Stands in for Triton's driver: names a target and owns no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class CompileOnly:
    """A kernel whose launch compiles it and hands what came out to `keep`."""

    def __init__(self, kernel: Any, keep: list[tuple[str, Any, Any]]) -> None:
        self.kernel = kernel
        self.keep = keep

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            variant = next(argument for argument in arguments if hasattr(argument, "safe"))
            if not variant.safe:
                self.keep.append(
                    (self.kernel.fn.__name__, variant, self.kernel.warmup(*arguments, grid=grid, **options))
                )

        return compile_it


def _assembled(compiled: Any, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(ptxas), "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas: no usage in its report:\n{report}")
    return int(registers[1]), sum(map(int, spills))


def measure(arch: int, weighting: str, dtype: str, width: int, kernels: tuple[str, ...] = KERNELS) -> Iterator[Usage]:
    """Compile the kernels of one case, forward with saved rows and backward with the gradient of a broadcast mask."""
    os.environ["SIGHTLINE_TUNING"] = os.devnull  # the defaults are meant, whatever this machine has tuned
    driver.set_active(Architecture(arch))
    compiled: list[tuple[str, Any, Any]] = []
    originals = {name: getattr(launch, name) for name in KERNELS}
    for name, kernel in originals.items():
        setattr(launch, name, CompileOnly(kernel, compiled))
    try:
        _call_operators(WEIGHTINGS[weighting], DTYPES[dtype], width, kernels)
    finally:
        for name, kernel in originals.items():
            setattr(launch, name, kernel)
    for name, variant, result in compiled:
        if name in kernels:
            registers, spilled = _assembled(result, arch)
            metadata = result.metadata
            tile = f"{variant.row_tile} x {variant.key_tile}, {metadata.num_warps} warps"
            if name == "attention_forward" and WEIGHTINGS[weighting].reweight and not variant.saves:
                name = "attention_forward, inference"
            yield Usage(arch, name, weighting, dtype, width, tile, registers, spilled, metadata.shared)


def _call_operators(weighting: Any, dtype: torch.dtype, width: int, kernels: tuple[str, ...]) -> None:
    query = torch.empty(1, HEADS, LENGTH, width, dtype=dtype)
    key = torch.empty(1, KEY_HEADS, LENGTH, width, dtype=dtype)
    rows = torch.empty(1, HEADS, LENGTH)
    saved_rows = torch.empty(1, HEADS, LENGTH, 6 if weighting.reweight else 2)
    saved_values = torch.empty_like(query, dtype=torch.float32) if weighting.reweight else torch.empty(0)
    scalars = (True, -1, -1, 0.1, 0.0, *weighting_scalars(weighting))
    nothing = [None] * 9
    if "attention_forward" in kernels:
        # With gradients and, where it takes another tile, without.
        for saves in (True, False) if weighting.reweight else (True,):
            launch.attention(query, key, key, *nothing, None, None, *scalars, saves, 0, 0, 0, 0, 0)
    if {"measure_split", "attend_split", "merge_splits"} & set(kernels):
        launch.attention(query[:, :, :1], key, key, *nothing, None, None, *scalars, False, 0, 0, 0, 0, 0)
    leading = (query, rows, query, key, key, query, saved_rows, saved_values)
    if {"prepare_rows", "query_gradients", "key_gradients"} & set(kernels):
        launch.attention_backward(*leading, *nothing, *scalars, False, False, False)
    if "mask_gradient" in kernels:
        options = [None, None, torch.empty(1, HEADS, 1, LENGTH), *nothing[3:]]
        backward = launch.Backward((*leading, *options, *scalars, True, False, False))
        backward.differentiate_mask(torch.empty(1, HEADS, 1, LENGTH))


def _page(usages: list[Usage]) -> str:
    lines = [
        "# What the Triton kernels use",
        "",
        f"Written by tools/triton_resources.py with Triton {triton.__version__}, without a GPU: causal, D = Dv.",
        "Registers are per thread, shared memory in KiB per block. No kernel may spill a register.",
        "",
        "| sm | kernel | weighting | dtype | D | tile (rows x keys) | registers | spilled bytes | shared KiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {u.arch} | {u.kernel} | {u.weighting} | {u.dtype} | {u.width} | {u.tile} | {u.registers} | {u.spilled} "
        f"| {u.shared / 1024:.0f} |"
        for u in usages
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(TABLED), choices=list(SHARED_MEMORY))
    parser.add_argument("--weighting", nargs="+", default=list(WEIGHTINGS), choices=list(WEIGHTINGS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--width", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--check", action="store_true", help="print only, write no page")
    arguments = parser.parse_args()
    usages: list[Usage] = []
    for arch in arguments.arch:
        for width in arguments.width:
            for dtype in arguments.dtype:
                for weighting in arguments.weighting:
                    for usage in measure(arch, weighting, dtype, width, tuple(arguments.kernel)):
                        print("ok   " if usage.fits else "SPILL", usage, flush=True)
                        usages.append(usage)
    if not arguments.check:
        PAGE.write_text(_page(usages))
    return 0 if usages and all(usage.fits for usage in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
