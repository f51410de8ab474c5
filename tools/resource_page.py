"""docs/triton_resources.md: written from what tools/triton_resources.py found, or held against it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import triton
from kernel_usage import Usage

PAGE = Path(__file__).parent.parent / "docs" / "triton_resources.md"
SECTIONS = {
    "defaults": """\
# What the Triton kernels use

Written by tools/triton_resources.py with Triton VERSION, without a GPU: causal, D = Dv. `.ci/run` compiles all of it
again, and fails where a register spills, or where a line differs in its tile, its spills or its products.
Registers are per thread, as ptxas reports them when Triton calls it (of AMD's chips vector and accumulation registers,
as the assembly states them), shared memory in KiB per block (there the local data share). No kernel may spill a
register. Products are the instructions that multiply matrices: wgmma those of whole warp groups, mma those of single
warps, mfma AMD's. The kernels for AMD's chips (gfx) are compiled and were never run.
""",
    "candidates": """\
## Tiles that tuning tries

Keys and values by tensor descriptors (sm_90 and newer), and loops that are split among warps besides
(sm_100): tiles that SIGHTLINE_AUTOTUNE=1 measures against the defaults. Warps are those of a whole program,
registers those it starts with; "descriptors" and "specialized" stand where the compiled code has them.
""",
    "recurrence": """\
## The additive recurrence

Forward and backward with a gain, a key mask and a state. A tile is rows of a chunk, channels and value columns.
""",
}
_COLUMNS = "target | kernel | {case} | dtype | D | tile{sides} | registers | spilled bytes | shared KiB | products"

Results = Iterable[tuple[str, Usage]]


def _line(usage: Usage) -> str:
    cells = (usage.target, usage.kernel, usage.case, usage.dtype, usage.width, usage.tile)
    measured = (usage.registers, usage.spilled, f"{usage.shared / 1024:.0f}", usage.products)
    return "| " + " | ".join(map(str, (*cells, *measured))) + " |"


def _heading(section: str) -> list[str]:
    recurs = section == "recurrence"
    columns = _COLUMNS.format(case="order" if recurs else "weighting", sides="" if recurs else " (rows x keys)")
    return [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]


def text(results: Results) -> str:
    """The page."""
    found = list(results)
    parts = []
    for section, introduction in SECTIONS.items():
        lines = [_line(usage) for own, usage in found if own == section]
        parts.append("\n".join([introduction.replace("VERSION", triton.__version__), *_heading(section), *lines]))
    return "\n\n".join(parts) + "\n"


def write(results: Results) -> None:
    PAGE.write_text(text(results))


def cells(page: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """By what was compiled (section, target, kernel, case, dtype, D and tile) what it uses."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    section = ""
    for line in page.splitlines():
        if line.startswith("#"):
            section = line.strip("# ")
        elif line.startswith(("| sm_", "| gfx")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[(section, *cells[:6])] = tuple(cells[6:])
    return found


def differences(results: Results, page: str | None = None) -> list[str]:
    """What the page says otherwise than these results: other tiles, spilled bytes or instructions that multiply.

    Registers and shared memory may differ by a few with another version of Triton: no reason to fail.
    """
    committed, fresh = cells(PAGE.read_text() if page is None else page), cells(text(results))
    found = []
    for key in [*fresh, *(key for key in committed if key not in fresh)]:
        name = ", ".join(key)
        if key not in committed:
            found.append(f"not on the page: {name}")
        elif key not in fresh:
            found.append(f"on the page, and not compiled: {name}")
        else:
            for name_of, place in (("spilled bytes", 1), ("products", 3)):
                before, now = committed[key][place], fresh[key][place]
                if before != now:
                    found.append(f"{name_of}, {before or 'none'} on the page and {now or 'none'} now: {name}")
    return found
