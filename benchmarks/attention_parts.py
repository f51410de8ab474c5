"""The machine's own rates, and what the parts of attention's forward pass on the CPU cost, as committed JSON.

    python benchmarks/attention_parts.py --widths 64,128

Packing, scores, weights and weights times V are timed apart by the bench module (build/bench, development builds), on
one thread, on as many query rows as a unit of work takes. Its rates of fused multiply-adds and of products of bfloat16
in registers, and the rate at which a sum reads memory, are what a kernel could reach at most. docs/performance.md is
made from the results by render.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from command_line import positive_integers, say, write_document
from decoding_ratio import read_bandwidth

from sightline.cli.environment import instruction_sets

SCHEMA = "sightline-parts/1"
ROOT = Path(__file__).parent.parent
PARTS = ("packing", "scores", "weights", "values")
OPERANDS = ("float32", "bfloat16")
WEIGHTINGS = ("softmax", "lssa")
ROWS = 4096  # of one head: so many that a unit of work is full


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
    """GFLOP/s of all threads together, by operands; 0 where the instruction set has no products of them."""

    def rate(operands: str) -> float:
        return float(bench.multiply_rate(isa, operands, seconds))

    with ThreadPoolExecutor(threads) as pool:
        return {operands: sum(pool.map(rate, [operands] * threads)) / 1e9 for operands in OPERANDS}


def time_parts(bench: ModuleType, isa: str, case: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Nanoseconds of every part per (row, key) pair, the median of repeated runs."""
    runs = [
        bench.attention_parts(
            isa, case["dtype"], case["weighting"], rows=ROWS, keys=case["length"], width=case["head_dim"], repetitions=1
        )
        for _ in range(repetitions)
    ]
    return case | {
        "rows": runs[0]["entries"] // case["length"],
        "repetitions": repetitions,
        "nanoseconds": {part: statistics.median(1e9 * run[part] / run["entries"] for run in runs) for part in PARTS},
    }


def main() -> None:
    """Measure everything asked for and write one JSON file into benchmarks/results."""
    parser = argparse.ArgumentParser(description="Time the parts of attention and the machine's rates, write JSON.")
    parser.add_argument("--widths", type=positive_integers, default=[64, 128], metavar="D,D,...")
    parser.add_argument("--length", type=int, default=4096, help="keys")
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    options = parser.parse_args()
    bench, isa = bench_module(), instruction_sets()["chosen"]
    say("rates of the machine")
    rates = {threads: multiply_rates(bench, isa, threads) for threads in sorted({1, torch.get_num_threads()})}
    timings = []
    for dtype, width, weighting in itertools.product(OPERANDS, options.widths, WEIGHTINGS):
        case = {"dtype": dtype, "weighting": weighting, "head_dim": width, "length": options.length}
        say(", ".join(map(str, case.values())))
        timings.append(time_parts(bench, isa, case, options.repetitions))
    found = {"multiply_gflops": rates, "read_gigabytes_per_second": read_bandwidth(), "timings": timings}
    write_document(SCHEMA, found, name=options.name)


if __name__ == "__main__":
    main()
