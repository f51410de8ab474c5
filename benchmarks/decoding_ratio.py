"""One-row decoding against torch SDPA and against the machine's read bandwidth, as committed JSON.

    python benchmarks/decoding_ratio.py --lengths 1024,4096,32768

Implementations take turns in one process. Every call of a case reads the next of several caches, so that together they
do not fit the last private cache level. Among the turns the same caches are read and nothing else is done with them, by
as many threads (machine_rates.py). docs/performance.md is made from the results by render.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any

import torch
from attention_peers import BASELINE
from command_line import positive_integers, say, write_document
from machine_rates import bench_module, read_rate
from rounds import sample_in_rounds
from torch.nn import functional

import sightline as sl
from sightline.cli.environment import instruction_sets
from sightline.cli.measure import Spread

SCHEMA = "sightline-decoding/1"
# Query heads, key heads, width: grouped queries as in Llama 3, and one query head per key head.
HEADS = ((32, 8, 128), (8, 8, 64))
# All caches of a case together are at least so large, and one sample reads at least so much.
CACHE_BYTES, SAMPLE_BYTES = 64 << 20, 32 << 20
READING = "reading"  # among the implementations: the caches are read, and that is all
SUMMED_BYTES = 256 << 20


def implementations(grouped: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Attention of one query row to all keys."""
    return {
        "sdpa": partial(functional.scaled_dot_product_attention, enable_gqa=grouped),
        "softmax": partial(sl.attention, weighting=sl.Softmax()),
        "lssa": partial(sl.attention, weighting=sl.LSSA()),
        "lssar": partial(sl.attention, weighting=sl.LSSAR()),
    }


def summing_bandwidth(seconds: float = 1.0) -> float:
    """GB/s of summing up a buffer that no private cache holds, the best of several: less than memory is read with."""
    buffer = torch.ones(SUMMED_BYTES // 8, dtype=torch.float64)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return SUMMED_BYTES / best / 1e9


def time_case(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, repetitions: int, bench: ModuleType | None
) -> list[dict[str, Any]]:
    """Seconds of a call of every implementation, with its read rate and its ratio to SDPA (above 1: faster).

    shape: query heads, key heads, width. bench: of a development build; without it no read rate of memory is measured.
    """
    heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(0)
    cache_bytes = 2 * key_heads * length * width * dtype.itemsize
    query = torch.randn(1, heads, 1, width, generator=generator).to(dtype)
    caches = torch.empty(max(1, -(-CACHE_BYTES // cache_bytes)), 2, 1, key_heads, length, width, dtype=dtype)
    caches.normal_(generator=generator)
    calls = max(1, SAMPLE_BYTES // cache_bytes)
    following = itertools.cycle(caches.unbind())

    def sample(attention: Callable[..., torch.Tensor]) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(calls):
                attention(query, *next(following))
            return (time.perf_counter() - start) / calls

    runs = {name: partial(sample, attention) for name, attention in implementations(heads != key_heads).items()}
    if bench is not None:
        isa, threads = instruction_sets()["chosen"], torch.get_num_threads()
        memory = caches.flatten().view(torch.float32).numpy()
        runs[READING] = lambda: cache_bytes / read_rate(bench, isa, memory, threads) / 1e9
    samples = sample_in_rounds(runs, repetitions)
    fastest_read = min(samples.values.pop(READING, []), default=None)
    medians = {name: Spread.of(found).median for name, found in samples.values.items() if name not in samples.errors}
    case = {"heads": heads, "key_heads": key_heads, "head_dim": width, "length": length, "dtype": str(dtype)[6:]}
    found = []
    for name, seconds in samples.values.items():
        result = case | {"implementation": name, "error": samples.errors.get(name)}
        if name in medians:
            result |= {
                "repetitions": len(seconds),
                "seconds": asdict(Spread.of(seconds)),
                "gigabytes_per_second": cache_bytes / medians[name] / 1e9,
                "ratio_to_sdpa": medians[BASELINE] / medians[name],
            }
            if fastest_read is not None:
                result["read_gigabytes_per_second"] = cache_bytes / fastest_read / 1e9
                result["share_of_bandwidth"] = fastest_read / medians[name]
        found.append(result)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cases; without the bench module shares refer to one rate, that of a sum."""
    try:
        bench: ModuleType | None = bench_module()
    except FileNotFoundError as error:
        say(f"shares of bandwidth refer to a sum of torch: {error}")
        bench = None
    timings = []
    for dtype, shape, length in itertools.product(options.dtypes, HEADS, options.lengths):
        say(f"{dtype}, H = {shape[0]}, Hk = {shape[1]}, D = {shape[2]}, N = {length:,}")
        timings += time_case(shape, length, getattr(torch, dtype), options.repetitions, bench)
    if bench is not None:
        return {"timings": timings}
    bandwidth = summing_bandwidth()
    for result in timings:
        if result["error"] is None:
            result["share_of_bandwidth"] = result["gigabytes_per_second"] / bandwidth
    return {"read_gigabytes_per_second": bandwidth, "timings": timings}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure one-row decoding and write JSON.")
    parser.add_argument("--lengths", type=positive_integers, default=[1024, 4096, 32768], metavar="N,N,...")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    return parser.parse_args(given)


def main() -> None:
    """Measure every case and write one JSON file into benchmarks/results."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    write_document(SCHEMA, measure(options))


if __name__ == "__main__":
    main()
