"""Attention against torch SDPA, and zentorch where it is installed: time ratios, peak memory, import time and call
overhead, as committed JSON.

    python benchmarks/attention_ratio.py --lengths 1024,4096 --dtypes float32,bfloat16

What the machine multiplies in registers is measured first. Implementations take turns in one process, so that ratios
hold on a machine that drifts; memory and import time are measured in fresh processes. docs/performance.md is made from
the results by render.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from attention_peers import (
    BASELINE,
    IMPLEMENTATIONS,
    LARGEST_DISTANCE,
    SAME_FUNCTION,
    Attention,
    Inputs,
    backward_pass,
    distance,
    forward_pass,
    forward_peers,
    implementations,
    random_inputs,
    training_pass,
)
from command_line import positive_integers, say, whole_numbers, write_document
from machine_rates import bench_module, multiply_rates, peaks_by_dtype
from rounds import sample_in_rounds

from sightline.cli.environment import installed_version, instruction_sets, versions
from sightline.cli.measure import Spread, attention_flops, interleave, matmul_peak, seconds_of
from sightline.cli.peak_memory import MeasurementError, describe_error, measure_peak

SCHEMA = "sightline-attention/1"
PASSES = {"forward": forward_pass, "backward": backward_pass}
# Of the forward pass's operations: two products there, five with the recomputed scores in the backward pass.
OPERATIONS = {"forward": 1.0, "backward": 2.5}
COMPARED_ROWS = 2048  # of the results of peers, from the first: longer contexts are only timed
IMPORT_RUNS = 7
OVERHEAD_CALLS, OVERHEAD_BLOCKS = 200, 15
SHORT_REPETITIONS = 5  # times those of a long call: a call of a millisecond is disturbed by anything


@dataclass(frozen=True)
class AttentionCall:
    """One forward pass on the CPU for `measure_peak`: causal, B = 1."""

    implementation: str
    heads: int
    length: int
    width: int
    dtype: str
    threads: int

    def prepare(self) -> Callable[[], torch.Tensor]:
        """Warm up on a short context and return the whole pass."""
        torch.set_num_threads(self.threads)
        attention, dtype, device = IMPLEMENTATIONS[self.implementation], getattr(torch, self.dtype), torch.device("cpu")
        forward_pass(attention, random_inputs(self.heads, 1024, self.width, dtype, device))()
        return forward_pass(attention, random_inputs(self.heads, self.length, self.width, dtype, device))


@dataclass(frozen=True)
class Case:
    """What all implementations are timed on."""

    direction: str
    causal: bool
    batch: int
    heads: int
    length: int
    width: int
    dtype: str

    def implementations(self, device: torch.device) -> dict[str, Attention]:
        """Those that can run it."""
        found = implementations(self.causal)
        if self.direction == "forward" and device.type == "cpu":
            found |= forward_peers(self.causal)[0]
        return found

    def flops(self) -> float:
        """Useful floating-point operations."""
        forward = attention_flops(self.heads, self.length, self.width, self.width, causal=self.causal)
        return forward * self.batch * OPERATIONS[self.direction]

    def fields(self) -> dict[str, Any]:
        """The case as it stands in every result."""
        return {
            "pass": self.direction,
            "causal": self.causal,
            "batch": self.batch,
            "heads": self.heads,
            "length": self.length,
            "head_dim": self.width,
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        pattern = "causal" if self.causal else "all keys"
        shape = f"B = {self.batch}, D = {self.width}, N = {self.length:,}"
        return f"{self.direction}, {pattern}, {self.dtype}, {shape}"


def wrong_results(attentions: dict[str, Attention], inputs: Inputs) -> dict[str, str]:
    """Why an implementation that should compute what the baseline computes must not be timed."""
    query, key, value = (tensor[:, :, :COMPARED_ROWS].contiguous() for tensor in inputs)
    inputs = query, key, value
    expected = forward_pass(attentions[BASELINE], inputs)()
    found = {}
    for name in SAME_FUNCTION:
        if name not in attentions:
            continue
        try:
            apart = distance(forward_pass(attentions[name], inputs)(), expected)
        except Exception as error:
            found[name] = describe_error(error)
            continue
        if not apart <= LARGEST_DISTANCE[expected.dtype]:
            found[name] = f"its result is {apart:.1e} from that of torch SDPA (relative Frobenius distance)"
    return found


def time_ratios(case: Case, device: torch.device, repetitions: int, limit: float = math.inf) -> list[dict[str, Any]]:
    """Seconds of every implementation in turns, with ratios of medians to torch SDPA (above 1: faster) and zentorch.

    limit: about so many seconds, at the cost of repetitions.
    """
    inputs = random_inputs(case.heads, case.length, case.width, getattr(torch, case.dtype), device, case.batch)
    attentions = case.implementations(device)
    errors = wrong_results(attentions, inputs)
    calls: dict[str, Callable[[], object]] = {}
    for name, attend in attentions.items():
        if name not in errors:
            try:
                calls[name] = PASSES[case.direction](attend, inputs)
            except Exception as error:
                errors[name] = describe_error(error)
    samples = sample_in_rounds(
        {name: partial(seconds_of, call, device) for name, call in calls.items()}, repetitions, limit
    )
    errors |= samples.errors
    spreads = {name: Spread.of(seconds) for name, seconds in samples.values.items() if name not in errors}
    found = []
    for name in attentions:
        result = case.fields() | {"implementation": name, "error": errors.get(name)}
        if name in spreads:
            median = spreads[name].median
            result |= {
                "repetitions": len(samples.values[name]),
                "seconds": asdict(spreads[name]),
                "gflops": case.flops() / median / 1e9,
                "ratio_to_sdpa": spreads[BASELINE].median / median,
            }
            if "zentorch" in spreads:
                result["ratio_to_zentorch"] = spreads["zentorch"].median / median
        found.append(result)
    return found


def peak_memory(heads: int, length: int, width: int, dtype: str) -> list[dict[str, Any]]:
    """Peak extra memory of one forward pass of every implementation, with and without its output, in bytes."""
    output_bytes = heads * length * width * getattr(torch, dtype).itemsize
    found = []
    for name in IMPLEMENTATIONS:
        say(f"peak memory, N = {length:,}: {name}")
        case = {"implementation": name, "heads": heads, "length": length, "head_dim": width, "dtype": dtype}
        try:
            peak = measure_peak(AttentionCall(name, heads, length, width, dtype, torch.get_num_threads()))
        except MeasurementError as error:
            found.append(case | {"error": str(error)})
            continue
        beyond = max(0, peak.extra_bytes - output_bytes)
        found.append(
            case
            | {"error": None, "method": peak.method, "seconds": peak.seconds}
            | {"extra_bytes": peak.extra_bytes, "beyond_output_bytes": beyond}
        )
    return found


def import_seconds() -> dict[str, float]:
    """Seconds that `import sightline` takes after `import torch`, in fresh processes, and those of torch itself."""
    program = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import sightline; "
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    runs = []
    for _ in range(IMPORT_RUNS):
        output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        runs.append([float(part) for part in output.split()])
    torch_seconds, sightline_seconds = zip(*runs, strict=True)
    return {
        "torch": statistics.median(torch_seconds),
        "sightline_after_torch": statistics.median(sightline_seconds),
        "runs": IMPORT_RUNS,
    }


def call_overhead(device: torch.device) -> list[dict[str, Any]]:
    """Microseconds per call on a single query and key: without gradients, recording them, and with backward."""
    query, key, value = random_inputs(1, 1, 8, torch.float32, device)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (query, key, value))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, attention in IMPLEMENTATIONS.items():
        calls[name, "no gradients"] = forward_pass(attention, (query, key, value))
        calls[name, "with gradients"] = partial(attention, *leaves)
        calls[name, "with gradients and backward"] = training_pass(attention, (query, key, value))

    def microseconds_per_call(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(OVERHEAD_CALLS):
            call()
        return (time.perf_counter() - start) / OVERHEAD_CALLS * 1e6

    runs = {f"{name}/{mode}": partial(microseconds_per_call, call) for (name, mode), call in calls.items()}
    blocks: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name, sample in interleave(runs, dict.fromkeys(runs, OVERHEAD_BLOCKS + 1)):
        if isinstance(sample, Exception):
            raise sample
        if turn > 1:
            blocks[name].append(sample)
    return [
        {"implementation": name, "mode": mode, "microseconds": asdict(Spread.of(blocks[f"{name}/{mode}"]))}
        for name, mode in calls
    ]


def cases_of(options: argparse.Namespace, dtype: str, width: int) -> list[Case]:
    """Causal attention in both directions, then forward over all keys, then forward over a batch of short sequences."""
    heads, short = options.heads, options.short_lengths
    return [
        *(Case(direction, True, 1, heads, length, width, dtype) for length in options.lengths for direction in PASSES),
        *(Case("forward", False, 1, heads, length, width, dtype) for length in options.full_lengths),
        *(
            Case("forward", causal, options.short_batch, heads, length, width, dtype)
            for causal in (True, False)
            for length in short
        ),
    ]


def measured_peaks(device: torch.device, dtypes: list[str]) -> dict[str, dict[str, float]]:
    """GFLOP/s that shares of peak refer to, by dtype: what all threads multiply in registers.

    Where the bench module was not built, and on other devices, the best of a large matrix product instead.
    """
    if device.type == "cpu":
        try:
            rates = multiply_rates(bench_module(), instruction_sets()["chosen"], torch.get_num_threads())
        except FileNotFoundError as error:
            say(f"shares of peak refer to matrix products: {error}")
        else:
            return {"register_gflops": rates, "peak_gflops": peaks_by_dtype(rates)}
    products = {dtype: matmul_peak(getattr(torch, dtype), device, seconds=1.0) for dtype in dtypes}
    return {"peak_gflops": products}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure sightline attention against torch SDPA and write JSON.")
    parser.add_argument("--lengths", type=positive_integers, default=[1024, 2048, 4096, 8192, 16384], metavar="N,N,...")
    parser.add_argument(
        "--full-lengths", type=whole_numbers, default=[1024, 4096], metavar="N,N,...", help="without causality"
    )
    parser.add_argument("--head-dims", type=positive_integers, default=[64, 128], metavar="D,D,...")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--short-batch", type=int, default=8, help="B of the short lengths")
    parser.add_argument(
        "--short-lengths", type=whole_numbers, default=[64, 196, 512], metavar="N,N,...", help="'': leave them out"
    )
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16", "float16"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seconds-per-case", type=float, default=15.0, help="long calls are repeated less often")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-length", type=int, default=65536, help="N for memory (CPU), 0: leave it out")
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    return parser.parse_args(given)


def main() -> None:
    """Measure everything asked for and write one JSON file into benchmarks/results."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    say("peak of the machine")
    peaks = measured_peaks(device, options.dtypes)
    timings = []
    for dtype in options.dtypes:
        for width in options.head_dims:
            for case in cases_of(options, dtype, width):
                say(str(case))
                factor = SHORT_REPETITIONS if case.length in options.short_lengths else 1
                timings += time_ratios(case, device, factor * options.repetitions, options.seconds_per_case)
    for result in timings:
        if result["error"] is None:
            result["share_of_peak"] = result["gflops"] / peaks["peak_gflops"][result["dtype"]]
    on_cpu = device.type == "cpu"
    memory = peak_memory(8, options.peak_length, 64, "float32") if on_cpu and options.peak_length else []
    say("import time and call overhead")
    found = {
        "versions": versions() | {"zentorch": installed_version("zentorch")},
        "left_out": forward_peers(causal=True)[1] if on_cpu else {},
        "deterministic_backward": torch.are_deterministic_algorithms_enabled(),
        **peaks,
        "timings": timings,
        "memory": memory,
        "import_seconds": import_seconds(),
        "call_overhead": call_overhead(device),
    }
    write_document(SCHEMA, found, device=device, name=options.name)


if __name__ == "__main__":
    main()
