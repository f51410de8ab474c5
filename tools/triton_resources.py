"""Compile the Triton kernels without a GPU, say what they use, and fail where a register spills.

    python tools/triton_resources.py             every case below; writes docs/triton_resources.md
    python tools/triton_resources.py --check --arch 90 --dtype bf16 --width 64 128 --weighting lssar
    python tools/triton_resources.py --candidates          the tiles with tensor descriptors, which no call gets untuned

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
from sightline.triton import launch, tuning
from sightline.triton.tiles import Tile, candidates, choose_tile

PAGE = Path(__file__).parent.parent / "docs" / "triton_resources.md"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTINGS = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
WIDTHS = (64, 128, 256)
# Bytes of shared memory that one block may use.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
TABLED = (80, 90)
# Candidates with descriptors on Hopper, and those of them that are specialised on Blackwell.
CANDIDATES_TABLED = (90, 100)
CANDIDATE_DTYPES = ("fp16", "bf16")
CANDIDATE_WIDTHS = (64, 128)
TITLE_OF_CANDIDATES = "## Tiles that tuning tries"
KERNELS = (
    "attention_forward",
    "prepare_rows",
    "query_gradients",
    "key_gradients",
    "mask_gradient",
    "count_visible_keys",
    "measure_keys",
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
    bulk_loads: int = 0  # instructions of the tensor memory accelerator
    split_loops: int = 0  # loops whose work has warps of its own
    products: str = ""  # the instructions that multiply: "wgmma" of whole warp groups, "mma" of single warps
    effective: bool = True  # whether what the tile asks for is in the code

    @property
    def fits(self) -> bool:
        return self.effective and self.spilled == 0 and self.shared <= SHARED_MEMORY[self.arch]


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


def _products(ptx: str) -> str:
    """The instructions by which a kernel multiplies matrices."""
    kinds = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync.aligned"}
    return " and ".join(kind for kind, instruction in kinds.items() if instruction in ptx)


def _launch_candidates(kernel: str, variant: Any, launch_tile: Any, describable: Any) -> Tile:
    """In place of tuning.tile_for: launch every candidate that has descriptors; on Blackwell the specialised ones."""
    specialized = driver.active.get_current_target().arch >= 100
    for tile in candidates(kernel, variant):
        if tile.descriptors and tile.specialized == specialized:
            launch_tile(tile)
    return choose_tile(kernel, variant)


def measure(
    arch: int,
    weighting: str,
    dtype: str,
    width: int,
    kernels: tuple[str, ...] = KERNELS,
    of_candidates: bool = False,
) -> Iterator[Usage]:
    """Compile the kernels of one case, forward with saved rows and backward with the gradient of a broadcast mask."""
    os.environ["SIGHTLINE_TUNING"] = os.devnull  # the defaults are meant, whatever this machine has tuned
    driver.set_active(Architecture(arch))
    compiled: list[tuple[str, Any, Any]] = []
    originals = {name: getattr(launch, name) for name in KERNELS}
    tile_for = tuning.tile_for
    for name in KERNELS:
        setattr(launch, name, CompileOnly(originals[name], compiled))
    if of_candidates:
        tuning.tile_for = _launch_candidates
    try:
        _call_operators(WEIGHTINGS[weighting], DTYPES[dtype], width, kernels)
    finally:
        for name, kernel in originals.items():
            setattr(launch, name, kernel)
        tuning.tile_for = tile_for
    seen: set[Usage] = set()
    for name, variant, result in compiled:
        if name in kernels and variant.descriptors == of_candidates:
            registers, spilled = _assembled(result, arch)
            metadata = result.metadata
            tile = f"{variant.row_tile} x {variant.key_tile}, {metadata.num_warps} warps"
            loads, loops = (
                result.asm["ptx"].count("cp.async.bulk.tensor"),
                result.asm["ttgir"].count("warp_specialize("),
            )
            tile += ", descriptors" * (loads > 0) + ", specialized" * (loops > 0)
            effective = variant.descriptors == (loads > 0) and variant.specialized == (loops > 0)
            if name == "attention_forward" and WEIGHTINGS[weighting].reweight and not variant.saves:
                name = "attention_forward, inference"
            usage = (arch, name, weighting, dtype, width, tile, registers, spilled, metadata.shared)
            found = Usage(*usage, loads, loops, _products(result.asm["ptx"]), effective)
            if found not in seen:  # forward and backward launch some kernels alike
                seen.add(found)
                yield found


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


def _table(usages: list[Usage]) -> list[str]:
    rows = [
        f"| {u.arch} | {u.kernel} | {u.weighting} | {u.dtype} | {u.width} | {u.tile} | {u.registers} | {u.spilled} "
        f"| {u.shared / 1024:.0f} | {u.products} |"
        for u in usages
    ]
    return [
        "| sm | kernel | weighting | dtype | D | tile (rows x keys) | registers | spilled bytes | shared KiB "
        "| products |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _page(usages: list[Usage]) -> str:
    lines = [
        "# What the Triton kernels use",
        "",
        f"Written by tools/triton_resources.py with Triton {triton.__version__}, without a GPU: causal, D = Dv.",
        "Registers are per thread, shared memory in KiB per block. No kernel may spill a register. Products are the",
        "instructions that multiply matrices: wgmma those of whole warp groups, mma those of single warps.",
        "",
        *_table(usages),
    ]
    return "\n".join(lines) + "\n"


def _section(usages: list[Usage]) -> str:
    lines = [
        TITLE_OF_CANDIDATES,
        "",
        "Keys and values by tensor descriptors (sm_90 and newer), and loops that are split among warps besides",
        "(sm_100): tiles that SIGHTLINE_AUTOTUNE=1 measures against the defaults. Warps are those of a whole program,",
        'registers those it starts with; "descriptors" and "specialized" stand where the compiled code has them.',
        "",
        *_table(usages),
    ]
    return "\n".join(lines) + "\n"


def _write(usages: list[Usage], of_candidates: bool) -> None:
    """Write one of the two tables of the page and keep the other."""
    tables, _, section = PAGE.read_text().partition(TITLE_OF_CANDIDATES) if PAGE.exists() else ("", "", "")
    if of_candidates:
        PAGE.write_text(tables.rstrip() + "\n\n" + _section(usages))
    else:
        PAGE.write_text(_page(usages) + ("\n" + TITLE_OF_CANDIDATES + section if section else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_MEMORY))
    parser.add_argument("--weighting", nargs="+", default=list(WEIGHTINGS), choices=list(WEIGHTINGS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--width", type=int, nargs="+")
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--candidates", action="store_true", help="the tiles with descriptors instead of the defaults")
    parser.add_argument("--check", action="store_true", help="print only, write no page")
    arguments = parser.parse_args()
    of_candidates = arguments.candidates
    architectures = arguments.arch or (CANDIDATES_TABLED if of_candidates else TABLED)
    dtypes = arguments.dtype or (CANDIDATE_DTYPES if of_candidates else DTYPES)
    widths = arguments.width or (CANDIDATE_WIDTHS if of_candidates else WIDTHS)
    usages: list[Usage] = []
    for arch in architectures:
        for width in widths:
            for dtype in dtypes:
                for weighting in arguments.weighting:
                    for usage in measure(arch, weighting, dtype, width, tuple(arguments.kernel), of_candidates):
                        print("ok   " if usage.fits else "SPILL", usage, flush=True)
                        usages.append(usage)
    if not arguments.check:
        _write(usages, of_candidates)
    return 0 if usages and all(usage.fits for usage in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
