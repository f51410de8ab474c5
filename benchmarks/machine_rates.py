"""The machine's own rates, measured by the bench module (build/bench, development builds): what kernels are held
against.

Fused multiply-adds and products of bfloat16 run in registers, so that no kernel of these operands can be faster; memory
is read and nothing else is done with it.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).parent.parent
OPERANDS = ("float32", "bfloat16")
# Beside the tile unit (AMX): what the vector unit multiplies.
VECTOR_PRODUCTS, VECTOR_PRODUCTS_ISA = "vdpbf16ps", "avx512_bf16"


def bench_module() -> ModuleType:
    """The module `_bench` of a development build.

    Raises:
        FileNotFoundError: it was not built.
    """
    path = ROOT / "build" / "bench" / f"_bench{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise FileNotFoundError(f"{path}: build it with `make build` (needs Python's headers)")
    spec = importlib.util.spec_from_file_location("_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def multiply_rates(bench: ModuleType, isa: str, threads: int, seconds: float = 0.5) -> dict[str, float]:
    """GFLOP/s of all threads together, by operands; 0 where the instruction set has no products of them.

    Where the tile unit multiplies bfloat16, "vdpbf16ps" says what the vector unit would.
    """

    def rate(asked: tuple[str, str]) -> float:
        return float(bench.multiply_rate(*asked, seconds))

    kinds = {operands: (isa, operands) for operands in OPERANDS}
    if isa.startswith("amx") and VECTOR_PRODUCTS_ISA in bench.isas():
        kinds[VECTOR_PRODUCTS] = (VECTOR_PRODUCTS_ISA, "bfloat16")
    with ThreadPoolExecutor(threads) as pool:
        return {operands: sum(pool.map(rate, [asked] * threads)) / 1e9 for operands, asked in kinds.items()}


def vector_times_after_products(bench: ModuleType, isa: str, seconds: float = 0.05) -> list[dict[str, float]]:
    """Nanoseconds of vector work alone and after four products of the tile unit, from short to long; [] without it.

    What the second takes longer shows whether both units work at the same time, and what it costs that the tile unit
    falls asleep during long work.
    """

    def nanoseconds(turns: int, after_products: bool) -> float:
        return 1e9 * float(bench.vector_seconds(isa, turns, after_products, seconds))

    if nanoseconds(0, True) == 0:
        return []
    return [
        {"alone": nanoseconds(turns, False), "after_products": nanoseconds(turns, True)}
        for turns in (0, 60, 150, 250, 400, 600, 1200, 2400)
    ]


def peaks_by_dtype(rates: dict[str, float]) -> dict[str, float]:
    """The rate that limits products in a dtype: float16 is multiplied as float32, as is bfloat16 without products.

    Example:
        >>> peaks_by_dtype({"float32": 500.0, "bfloat16": 0.0})
        {'float32': 500.0, 'float16': 500.0, 'bfloat16': 500.0}
    """
    return {
        "float32": rates["float32"],
        "float16": rates["float32"],
        "bfloat16": rates["bfloat16"] or rates["float32"],
    }


def read_rate(bench: ModuleType, isa: str, memory: np.ndarray, threads: int, passes: int = 3) -> float:
    """GB/s at which the threads read this memory (contiguous, float32), the best of the passes."""
    return float(bench.read_rate(isa, memory, threads, passes)) / 1e9
