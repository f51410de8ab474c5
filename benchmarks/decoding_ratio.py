"""One-row decoding against torch SDPA and against the machine's read bandwidth, as committed JSON.

    python benchmarks/decoding_ratio.py --lengths 1024,4096,32768

Implementations take turns in one process. Every call of a case reads the next of several caches, so that together they
do not fit the last private cache level. docs/performance.md is made from the results by render.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from attention_peers import BASELINE
from command_line import positive_integers, say, write_document
from torch.nn import functional

import sightline as sl
from sightline.cli.measure import Spread, interleave
from sightline.cli.peak_memory import describe_error

SCHEMA = "sightline-decoding/1"
# Query heads, key heads, width: grouped queries as in Llama 3, and one query head per key head.
HEADS = ((32, 8, 128), (8, 8, 64))
# All caches of a case together are at least so large, and one sample reads at least so much.
CACHE_BYTES, SAMPLE_BYTES = 64 << 20, 32 << 20
READ_BYTES = 256 << 20


def implementations(grouped: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Attention of one query row to all keys."""
    return {
        "sdpa": partial(functional.scaled_dot_product_attention, enable_gqa=grouped),
        "softmax": partial(sl.attention, weighting=sl.Softmax()),
        "lssa": partial(sl.attention, weighting=sl.LSSA()),
        "lssar": partial(sl.attention, weighting=sl.LSSAR()),
    }


def read_bandwidth(seconds: float = 1.0) -> float:
    """GB/s of summing up a buffer that no private cache holds: the best of several."""
    buffer = torch.ones(READ_BYTES // 8, dtype=torch.float64)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best / 1e9


def time_case(
    heads: int, key_heads: int, width: int, length: int, dtype: torch.dtype, repetitions: int
) -> list[dict[str, Any]]:
    """Seconds of a call of every implementation, with its read rate and its ratio to SDPA (above 1: faster)."""
    generator = torch.Generator().manual_seed(0)
    cache_bytes = 2 * key_heads * length * width * dtype.itemsize
    query = torch.randn(1, heads, 1, width, generator=generator).to(dtype)
    caches = [
        [torch.randn(1, key_heads, length, width, generator=generator).to(dtype) for _ in range(2)]
        for _ in range(max(1, -(-CACHE_BYTES // cache_bytes)))
    ]
    calls = max(1, SAMPLE_BYTES // cache_bytes)
    following = itertools.cycle(caches)

    def sample(attention: Callable[..., torch.Tensor]) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(calls):
                attention(query, *next(following))
            return (time.perf_counter() - start) / calls

    runs = {name: partial(sample, attention) for name, attention in implementations(heads != key_heads).items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    for turn, name, seconds in interleave(runs, dict.fromkeys(runs, repetitions + 1)):
        if isinstance(seconds, Exception):
            errors[name] = describe_error(seconds)
        elif turn > 1:  # the first round warms up
            samples[name].append(seconds)
    case = {"heads": heads, "key_heads": key_heads, "head_dim": width, "length": length, "dtype": str(dtype)[6:]}
    found = []
    for name in runs:
        result = case | {"implementation": name, "error": errors.get(name)}
        if name not in errors:
            median = statistics.median(samples[name])
            result |= {
                "repetitions": len(samples[name]),
                "seconds": asdict(Spread.of(samples[name])),
                "gigabytes_per_second": cache_bytes / median / 1e9,
                "ratio_to_sdpa": statistics.median(samples[BASELINE]) / median,
            }
        found.append(result)
    return found


def main() -> None:
    """Measure every case and write one JSON file into benchmarks/results."""
    parser = argparse.ArgumentParser(description="Measure one-row decoding and write JSON.")
    parser.add_argument("--lengths", type=positive_integers, default=[1024, 4096, 32768], metavar="N,N,...")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bandwidth = read_bandwidth()
    timings = []
    for dtype, shape, length in itertools.product(options.dtypes, HEADS, options.lengths):
        say(f"{dtype}, H = {shape[0]}, Hk = {shape[1]}, D = {shape[2]}, N = {length:,}")
        timings += time_case(*shape, length, getattr(torch, dtype), options.repetitions)
        bandwidth = max(bandwidth, read_bandwidth(0.2))
    for result in timings:
        if result["error"] is None:
            result["share_of_bandwidth"] = result["gigabytes_per_second"] / bandwidth
    write_document(SCHEMA, {"read_gigabytes_per_second": bandwidth, "timings": timings})


if __name__ == "__main__":
    main()
