"""The additive recurrence against its formula in PyTorch, torch SDPA and matrix products, as committed JSON.

    python benchmarks/recurrence_ratio.py --lengths 1024,4096 --dtypes float32,bfloat16

Implementations take turns in one process, so that ratios hold on a machine that drifts; memory is measured in a fresh
process. docs/performance.md is made from the results by render.py.
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
from recurrence_peers import CAUSAL, UNORDERED, backward_pass, decoding_step, forward_pass, random_inputs

from sightline.cli.measure import Spread, interleave, seconds_of
from sightline.cli.peak_memory import measure_peak

SCHEMA = "sightline-recurrence/1"
DECODING_CALLS = 50

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True)
class RecurrenceCall:
    """One causal forward pass for `measure_peak`, B = 1."""

    heads: int
    length: int
    width: int
    dtype: str
    threads: int

    def prepare(self) -> Callable[[], torch.Tensor]:
        """Warm up on a short context and return the whole pass."""
        torch.set_num_threads(self.threads)
        dtype = getattr(torch, self.dtype)
        forward_pass(CAUSAL["recurrence"], random_inputs(self.heads, 1024, self.width, dtype))()
        return forward_pass(CAUSAL["recurrence"], random_inputs(self.heads, self.length, self.width, dtype))


def in_turns(
    what: str, calls: dict[str, Callable[[], object]], case: dict[str, Any], repetitions: int, calls_per_run: int = 1
) -> list[dict[str, Any]]:
    """Seconds of every call in turns, with the ratio of the first one's median to the others'."""
    say(what + " " + ", ".join(f"{name} {value}" for name, value in case.items()))

    def run(call: Callable[[], object]) -> float:
        def several() -> None:
            for _ in range(calls_per_run):
                call()

        return seconds_of(several, CPU) / calls_per_run

    samples: dict[str, list[float]] = {name: [] for name in calls}
    runs = {name: partial(run, call) for name, call in calls.items()}
    for turn, name, sample in interleave(runs, dict.fromkeys(runs, repetitions + 1)):
        if isinstance(sample, Exception):
            raise sample
        if turn > 1:  # the first round warms up
            samples[name].append(sample)
    spreads = {name: Spread.of(seconds) for name, seconds in samples.items()}
    own = next(iter(spreads.values())).median
    return [
        {"measurement": what, **case, "implementation": name, "seconds": asdict(spread), "ratio": spread.median / own}
        for name, spread in spreads.items()
    ]


def measure(options: argparse.Namespace, dtype_name: str) -> list[dict[str, Any]]:
    """Everything that is measured in turns in one dtype."""
    dtype, heads, width = getattr(torch, dtype_name), options.heads, options.width
    shape = {"dtype": dtype_name, "heads": heads, "width": width}
    found = []
    for length in options.lengths:
        inputs, case = random_inputs(heads, length, width, dtype), shape | {"length": length}
        causal = {name: forward_pass(function, inputs) for name, function in CAUSAL.items()}
        if length > options.sdpa_limit:
            del causal["sdpa"]
        found += in_turns("causal", causal, case, options.repetitions)
        unordered = {name: forward_pass(function, inputs) for name, function in UNORDERED.items()}
        found += in_turns("unordered", unordered, case, options.repetitions)
        passes = {"forward": causal["recurrence"], "backward": backward_pass(inputs)}
        found += in_turns("backward", passes, case, options.repetitions)
    case = shape | {"length": 1}
    found += in_turns("decoding", decoding_step(heads, width, dtype), case, 5 * options.repetitions, DECODING_CALLS)
    for length in options.long_lengths:
        call = forward_pass(CAUSAL["recurrence"], random_inputs(heads, length, width, dtype))
        found += in_turns("length", {"recurrence": call}, shape | {"length": length}, options.repetitions)
    return found


def keep_freed_memory() -> None:
    """Let the allocator reuse large blocks: fresh pages can cost more than a pass, of every implementation alike."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the additive recurrence against its peers and write JSON.")
    parser.add_argument("--lengths", type=whole_numbers, default=[1024, 4096, 16384], metavar="N,N,...")
    parser.add_argument("--long-lengths", type=whole_numbers, default=[4096, 65536, 1048576], metavar="N,N,...")
    parser.add_argument("--sdpa-limit", type=int, default=4096, metavar="N", help="longest context of torch SDPA")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="Dk and Dv")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--peak-length", type=int, default=1048576, help="N for memory, 0: leave it out")
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    return parser.parse_args()


def main() -> None:
    """Measure everything asked for and write one JSON file into benchmarks/results."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    memory = []
    if options.peak_length:
        say(f"peak memory, N = {options.peak_length:,}")
        shape = {"heads": options.heads, "length": options.peak_length, "width": options.width, "dtype": "bfloat16"}
        peak = measure_peak(RecurrenceCall(**shape, threads=torch.get_num_threads()))
        output_bytes = 2 * options.heads * options.peak_length * options.width
        beyond = max(0, peak.extra_bytes - output_bytes)
        memory.append(shape | {"extra_bytes": peak.extra_bytes, "beyond_output_bytes": beyond, "method": peak.method})
    keep_freed_memory()
    timings = [result for dtype in options.dtypes for result in measure(options, dtype)]
    write_document(SCHEMA, {"timings": timings, "memory": memory}, name=options.name)


if __name__ == "__main__":
    main()
