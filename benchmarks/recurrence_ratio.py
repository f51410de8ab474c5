"""The additive recurrence against its formula in PyTorch, torch SDPA and matrix products, as committed JSON.

    python benchmarks/recurrence_ratio.py --lengths 1024,4096 --dtypes float32,bfloat16

Implementations take turns in one process, so that ratios hold on a machine that drifts, and with --sweeps every case
comes up several times in a run, so that a disturbance of minutes does not decide it; what the machine multiplied and
read is measured at the start of each. Memory is measured in fresh processes. What does not fit into memory is left out,
with the reason in its place. docs/performance.md is made from the results by render.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from command_line import CPU, say, whole_numbers, write_document
from machine_rates import bench_module, multiply_rates, read_rate
from recurrence_peers import (
    CAUSAL,
    UNORDERED,
    backward_pass,
    decoding_steps,
    forward_pass,
    layered_decoding_steps,
    random_inputs,
)
from rounds import sample_in_rounds

from sightline.cli.environment import available_memory, instruction_sets
from sightline.cli.measure import Spread, seconds_of
from sightline.cli.peak_memory import measure_peak

SCHEMA = "sightline-recurrence/1"
DECODING_CALLS, LAYERED_DECODING_CALLS = 50, 4
RUN_TOKENS = 65536  # of a long context or of several shorter ones
READ_BYTES = 512 * 2**20
MEMORY_SHARE = 0.95  # of what is available: the rest is for the program itself

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 2**10, 65536
_NEVER_TRIM = -1  # the largest number that mallopt takes, 2 GiB, is no more than one output of 1M tokens


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
    """Rows of the seconds that every call took, in turns, in the order of the calls: one sweep's.

    limit: about so many seconds, at the cost of repetitions.
    """
    say(what + " " + ", ".join(f"{name} {value}" for name, value in case.items()))
    runs = {name: partial(seconds_per_call, call, calls_per_run) for name, call in calls.items()}
    return [row_of(what, case, name, seconds) for name, seconds in all_samples(what, runs, repetitions, limit).items()]


def all_samples(
    what: str, runs: dict[str, Callable[[], float]], repetitions: int, limit: float
) -> dict[str, list[float]]:
    """What runs return in turns; one that fails ends the benchmark."""
    samples = sample_in_rounds(runs, repetitions, limit)
    if samples.errors:
        raise RuntimeError(f"{what}: {samples.errors}")
    return samples.values


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """What each of so many calls in a row takes."""

    def several() -> None:
        for _ in range(calls):
            call()

    return seconds_of(several, CPU) / calls


def row_of(what: str, case: dict[str, Any], name: str, seconds: list[float]) -> dict[str, Any]:
    """What one implementation took in one sweep."""
    return {"measurement": what, **case, "implementation": name, "samples": seconds}


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results in the order of the first sweep: repetitions and spread of the samples of all sweeps.

    The ratio is that of the medians of an implementation and of the one that stands first in its case. A case that no
    sweep had memory for keeps its error.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    samples: dict[tuple[Any, ...], list[float]] = {}
    errors: dict[tuple[Any, ...], str] = {}
    for row in rows:
        described = {name: value for name, value in row.items() if name not in ("samples", "error")}
        key = tuple(described.values())
        found.setdefault(key, described)
        samples.setdefault(key, []).extend(row.get("samples", ()))
        if "error" in row:
            errors[key] = row["error"]
    own: dict[tuple[Any, ...], float] = {}  # by case: the implementation is the last part of a key
    for key, result in found.items():
        if samples[key]:
            spread = Spread.of(samples[key])
            ratio = spread.median / own.setdefault(key[:-1], spread.median)
            result |= {"repetitions": len(samples[key]), "seconds": asdict(spread), "ratio": ratio}
        else:
            result["error"] = errors[key]
    return list(found.values())


def machine_rates(threads: int) -> dict[str, Any] | None:
    """What the machine multiplies in registers and reads now, or None without a development build."""
    try:
        bench = bench_module()
    except FileNotFoundError:
        return None
    isa = instruction_sets()["chosen"]
    memory = np.ones(READ_BYTES // 4, dtype=np.float32)
    return {
        "multiply_gflops": multiply_rates(bench, isa, threads),
        "read_gigabytes_per_second": read_rate(bench, isa, memory, threads),
    }


def measure(options: argparse.Namespace, dtype_name: str, sweep: int = 0) -> list[dict[str, Any]]:
    """Everything that is measured in turns in one dtype, once; rows for `pooled`."""
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
        # One state stays in the caches; those of a model's layers pass through them in turn.
        steps = layered_decoding_steps(options.decoding_layers, batch, heads, width, dtype)
        case |= {"layers": options.decoding_layers}
        found += in_turns("decoding in layers", steps, case, 5 * repetitions, limit, LAYERED_DECODING_CALLS)
    return found + measure_lengths(options, shape, sweep)


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


def measure_lengths(options: argparse.Namespace, shape: dict[str, Any], sweep: int = 0) -> list[dict[str, Any]]:
    """The causal forward pass of long contexts, all in turns, and in the first sweep SDPA once at one length.

    Short contexts are repeated, so that what disturbs a run for a moment weighs alike in all of them.
    """
    calls, errors, dtype = {}, {}, getattr(torch, shape["dtype"])
    return_freed_memory()
    for length in sorted(options.long_lengths):
        errors[length] = want_of_memory(shape | {"length": length})
        if errors[length]:
            say(f"length {length:,}: {errors[length]}")
        else:
            inputs = random_inputs(shape["heads"], length, shape["width"], dtype)
            calls[length] = {name: forward_pass(CAUSAL[name], inputs) for name in ("recurrence", "sdpa")}
    seconds = {}
    if calls:
        say(f"lengths {', '.join(map(str, calls))}, {shape['dtype']}")
        output_bytes = shape["heads"] * max(calls) * shape["width"] * dtype.itemsize
        runs = {
            str(length): partial(seconds_per_call, call["recurrence"], max(1, RUN_TOKENS // length))
            for length, call in calls.items()
        }
        seconds = in_kept_memory(output_bytes, runs, options.repetitions, len(runs) * options.seconds_per_case)
    found = []
    for length, error in errors.items():
        case = shape | {"length": length}
        if error:
            found.append({"measurement": "length", **case, "implementation": "recurrence", "error": error})
            continue
        found.append(row_of("length", case, "recurrence", seconds[str(length)]))
        if length == options.sdpa_once and sweep == 0:
            found.append(row_of("length", case, "sdpa", [seconds_of(calls[length]["sdpa"], CPU)]))
    return found


def in_kept_memory(
    output_bytes: int, runs: dict[str, Callable[[], float]], repetitions: int, limit: float
) -> dict[str, list[float]]:
    """What runs return in turns where outputs get memory that has been in use before, if there is enough of it.

    output_bytes: of the largest output.
    """
    return_freed_memory()
    outputs = outputs_to_keep(output_bytes, repetitions)
    if outputs:
        torch.empty(outputs * output_bytes, dtype=torch.uint8).zero_()  # freed, and kept by the allocator
    else:
        keep_freed_memory(False)
    found = all_samples("length", runs, repetitions, limit)
    if not outputs:
        keep_freed_memory()
    return found


def outputs_to_keep(output_bytes: int, repetitions: int) -> int:
    """How many outputs to have memory for before the passes: one for each and one more, or what fits, two or none.

    An aligned block does not always fit where one of its size was freed, so that one alone is not enough.
    """
    available = available_memory(CPU)
    fitting = 0 if available is None else int(MEMORY_SHARE * available // output_bytes)
    return min(repetitions + 1, fitting) if fitting > 1 else 0


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
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM if keeps else _DEFAULT_TRIM_THRESHOLD)


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
    parser.add_argument("--decoding-layers", type=int, default=16, metavar="L", help="states that take turns")
    parser.add_argument("--one-head-length", type=int, default=16384, metavar="N", help="one head, two threads and one")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="Dk and Dv")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--seconds-per-case", type=float, default=20.0, help="of a sweep: long calls are repeated less often"
    )
    parser.add_argument("--sweeps", type=int, default=1, help="how often every case comes up")
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
    rates, rows = [], []
    for sweep in range(options.sweeps):
        say(f"sweep {sweep + 1} of {options.sweeps}")
        rates.append(machine_rates(torch.get_num_threads()))
        rows += [row for dtype in options.dtypes for row in measure(options, dtype, sweep)]
    found = {"machine_rates": [rate for rate in rates if rate], "timings": pooled(rows), "memory": memory}
    write_document(SCHEMA, found, name=options.name)


if __name__ == "__main__":
    main()
