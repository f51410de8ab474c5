"""The machine's own rates, and what the parts of attention's forward pass on the CPU cost, as committed JSON.

    python benchmarks/attention_parts.py --widths 64,128

Packing, scores, weights and weights times V are timed apart by the bench module (build/bench, development builds), on
one thread, on as many query rows as a unit of work takes. What the machine multiplies in registers and reads from
memory (machine_rates.py) is what a kernel could reach at most. render.py shows the results.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from types import ModuleType
from typing import Any

import torch
from command_line import positive_integers, say, write_document
from machine_rates import bench_module, multiply_rates, read_rate, vector_times_after_products

from sightline.cli.environment import instruction_sets

SCHEMA = "sightline-parts/1"
PARTS = ("packing", "scores", "weights", "values")
DTYPES = ("float32", "float16", "bfloat16")
WEIGHTINGS = ("softmax", "lssa")
ROWS = 4096  # of one head: so many that a unit of work is full
READ_BYTES = 256 << 20  # no private cache holds them


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
    most = torch.get_num_threads()
    rates = {threads: multiply_rates(bench, isa, threads) for threads in sorted({1, most})}
    read = read_rate(bench, isa, torch.ones(READ_BYTES // 4).numpy(), most, passes=20)
    after_products = vector_times_after_products(bench, isa)
    timings = []
    for dtype, width, weighting in itertools.product(DTYPES, options.widths, WEIGHTINGS):
        case = {"dtype": dtype, "weighting": weighting, "head_dim": width, "length": options.length}
        say(", ".join(map(str, case.values())))
        timings.append(time_parts(bench, isa, case, options.repetitions))
    found = {
        "multiply_gflops": rates,
        "read_gigabytes_per_second": read,
        "vector_nanoseconds": after_products,
        "timings": timings,
    }
    write_document(SCHEMA, found, name=options.name)


if __name__ == "__main__":
    main()
