"""The additive recurrence against its formula in PyTorch, torch SDPA and matrix products, as committed JSON.

    python benchmarks/recurrence_ratio.py --lengths 1024,4096 --dtypes float32,bfloat16

Implementations take turns in one process, so that ratios hold on a machine that drifts; memory is measured in fresh
processes. What does not fit into memory is left out, with the reason in its place. docs/performance.md is made from the
results by render.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from command_line import CPU, say, whole_numbers, write_document
from recurrence_peers import CAUSAL, UNORDERED, backward_pass, decoding_steps, forward_pass, random_inputs
from rounds import sample_in_rounds

from sightline.cli.environment import available_memory
from sightline.cli.measure import Spread, seconds_of
from sightline.cli.peak_memory import measure_peak

SCHEMA = "sightline-recurrence/1"
DECODING_CALLS = 50
MEMORY_SHARE = 0.95  # of what is available: the rest is for the program itself

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 2**10, 65536
# Bytes of an output. An aligned block does not always fit where one of its size was freed, and memory would not hold
# one more of the larger ones for every repetition.
LARGEST_KEPT = 2**30


@dataclass(frozen=True)
class RecurrenceCall:
    """One causal forward pass for `measure_peak`, B = 1."""

    heads: int
    length: int
    width: int
    dtype: str
    threads: int

    def prepare(self) -> Callable[[], object]:
        """Warm up on a short context and return the whole pass."""
        torch.set_num_threads(self.threads)
        dtype = getattr(torch, self.dtype)
        forward_pass(CAUSAL["recurrence"], random_inputs(self.heads, 1024, self.width, dtype))()
        return forward_pass(CAUSAL["recurrence"], random_inputs(self.heads, self.length, self.width, dtype))


def in_turns(
    what: str,
    calls: dict[str, Callable[[], object]],
    case: dict[str, Any],
    repetitions: int,
    limit: float,
    calls_per_run: int = 1,
) -> list[dict[str, Any]]:
    """Seconds of every call in turns, with the ratio of the others' medians to the first one's.

    limit: about so many seconds, at the cost of repetitions.
    """
    say(what + " " + ", ".join(f"{name} {value}" for name, value in case.items()))

    def run(call: Callable[[], object]) -> float:
        def several() -> None:
            for _ in range(calls_per_run):
                call()

        return seconds_of(several, CPU) / calls_per_run

    samples = sample_in_rounds({name: partial(run, call) for name, call in calls.items()}, repetitions, limit)
    if samples.errors:
        raise RuntimeError(f"{what}: {samples.errors}")
    own = Spread.of(next(iter(samples.values.values()))).median
    return [result_of(what, case, name, seconds, own) for name, seconds in samples.values.items()]


def result_of(what: str, case: dict[str, Any], name: str, seconds: list[float], own: float) -> dict[str, Any]:
    """One row: repeated measurements in seconds, and the ratio of their median to `own`."""
    spread = Spread.of(seconds)
    found = {"measurement": what, **case, "implementation": name, "repetitions": len(seconds)}
    return found | {"seconds": asdict(spread), "ratio": spread.median / own}


def measure(options: argparse.Namespace, dtype_name: str) -> list[dict[str, Any]]:
    """Everything that is measured in turns in one dtype."""
    dtype, heads, width = getattr(torch, dtype_name), options.heads, options.width
    repetitions, limit = options.repetitions, options.seconds_per_case
    shape = {"dtype": dtype_name, "batch": 1, "heads": heads, "width": width}
    found = []
    for length in options.lengths:
        inputs, case = random_inputs(heads, length, width, dtype), shape | {"length": length}
        causal = {name: forward_pass(function, inputs) for name, function in CAUSAL.items()}
        if length > options.sdpa_limit:
            del causal["sdpa"]
        found += in_turns("causal", causal, case, repetitions, limit)
        unordered = {name: forward_pass(function, inputs) for name, function in UNORDERED.items()}
        found += in_turns("unordered", unordered, case, repetitions, limit)
        passes = {"forward": causal["recurrence"], "backward": backward_pass(inputs)}
        found += in_turns("backward", passes, case, repetitions, limit)
        passes = {"forward": unordered["recurrence"], "backward": backward_pass(inputs, causal=False)}
        found += in_turns("unordered backward", passes, case, repetitions, limit)
    found += measure_one_head(options, shape)
    for batch in options.decoding_batches:
        steps, case = decoding_steps(batch, heads, width, dtype), shape | {"batch": batch, "length": 1}
        found += in_turns("decoding", steps, case, 5 * repetitions, limit, DECODING_CALLS)
    for length in options.long_lengths:
        found += measure_long(options, shape | {"length": length})
    return found


def measure_one_head(options: argparse.Namespace, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """One head on two threads against one, every pass; ratios are to the time of two threads."""
    case = shape | {"heads": 1, "length": options.one_head_length}
    inputs = random_inputs(1, options.one_head_length, options.width, getattr(torch, shape["dtype"]))
    found = []
    for order, functions, causal in (("causal", CAUSAL, True), ("unordered", UNORDERED, False)):
        passes = {"": forward_pass(functions["recurrence"], inputs), " backward": backward_pass(inputs, causal)}
        for suffix, call in passes.items():
            calls = {"two threads": partial(on_threads, 2, call), "one thread": partial(on_threads, 1, call)}
            found += in_turns(f"one head, {order}{suffix}", calls, case, options.repetitions, options.seconds_per_case)
    return found


def on_threads(threads: int, call: Callable[[], object]) -> object:
    """The call on so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def measure_long(options: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The causal forward pass of a long context, at one length beside a single pass of torch SDPA."""
    return_freed_memory()
    reason = want_of_memory(case)
    if reason:
        say(f"length {case['length']:,}: {reason}")
        return [{"measurement": "length", **case, "implementation": "recurrence", "error": reason}]
    dtype = getattr(torch, case["dtype"])
    inputs = random_inputs(case["heads"], case["length"], case["width"], dtype)
    call = forward_pass(CAUSAL["recurrence"], inputs)
    large = case["heads"] * case["length"] * case["width"] * dtype.itemsize > LARGEST_KEPT
    if large:
        keep_freed_memory(False)
    found = in_turns("length", {"recurrence": call}, case, options.repetitions, options.seconds_per_case)
    if large:
        keep_freed_memory()
    if case["length"] == options.sdpa_once:
        seconds = seconds_of(forward_pass(CAUSAL["sdpa"], inputs), CPU)
        found.append(result_of("length", case, "sdpa", [seconds], found[0]["seconds"]["median"]))
    return found


def want_of_memory(case: dict[str, Any]) -> str | None:
    """Why a causal forward pass of this size cannot be measured, or None: query, key, value and output must fit."""
    item = getattr(torch, case["dtype"]).itemsize
    # Inputs of 16 bits are rounded from numbers in float32, one tensor at a time.
    needed = case["heads"] * case["length"] * case["width"] * max(4 * item, 3 * item + 4)
    available = available_memory(CPU)
    if available is None or needed <= MEMORY_SHARE * available:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"


def measure_memory(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Peak memory of one long causal forward pass in bytes, with and without its output."""
    case = {"heads": options.heads, "length": options.peak_length, "width": options.width, "dtype": dtype}
    say(f"peak memory, N = {options.peak_length:,}, {dtype}")
    reason = want_of_memory(case)
    if reason:
        return case | {"error": reason}
    peak = measure_peak(RecurrenceCall(**case, threads=torch.get_num_threads()))
    output_bytes = case["heads"] * case["length"] * case["width"] * getattr(torch, dtype).itemsize
    beyond = max(0, peak.extra_bytes - output_bytes)
    return case | {"extra_bytes": peak.extra_bytes, "beyond_output_bytes": beyond, "method": peak.method}


def keep_freed_memory(keeps: bool = True) -> None:
    """Let the allocator reuse large blocks: fresh pages can cost more than a pass, of every implementation alike.

    With `keeps` false it hands blocks back to the system when they are freed, as it would by itself.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0 if keeps else _DEFAULT_MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if keeps else _DEFAULT_TRIM_THRESHOLD)


def return_freed_memory() -> None:
    """Hand back to the system what `keep_freed_memory` kept, so that it counts as available."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the additive recurrence against its peers and write JSON.")
    parser.add_argument("--lengths", type=whole_numbers, default=[1024, 4096, 16384], metavar="N,N,...")
    parser.add_argument("--long-lengths", type=whole_numbers, default=[4096, 65536, 1048576], metavar="N,N,...")
    parser.add_argument("--sdpa-limit", type=int, default=16384, metavar="N", help="longest repeated one of torch SDPA")
    parser.add_argument("--sdpa-once", type=int, default=65536, metavar="N", help="long context of one pass of SDPA")
    parser.add_argument("--decoding-batches", type=whole_numbers, default=[1, 16], metavar="B,B,...")
    parser.add_argument("--one-head-length", type=int, default=16384, metavar="N", help="one head, two threads and one")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="Dk and Dv")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds-per-case", type=float, default=20.0, help="long calls are repeated less often")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--peak-length", type=int, default=1048576, help="N for memory, 0: leave it out")
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    return parser.parse_args(given)


def main() -> None:
    """Measure everything asked for and write one JSON file into benchmarks/results."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    memory = [measure_memory(options, dtype) for dtype in options.dtypes] if options.peak_length else []
    keep_freed_memory()
    timings = [result for dtype in options.dtypes for result in measure(options, dtype)]
    write_document(SCHEMA, {"timings": timings, "memory": memory}, name=options.name)


if __name__ == "__main__":
    main()
