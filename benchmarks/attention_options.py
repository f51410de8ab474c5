"""What options, widths, threads and a narrower instruction set cost attention on the CPU, as committed JSON.

    python benchmarks/attention_options.py --length 4096 --dtypes float32,bfloat16

Every group of calls takes turns in one process, and each result stands beside the first of its group: masks beside the
plain call, every width beside D = 128, one thread beside all, a window at a long length beside the same at a short one.
AVX2 is measured in child processes, beside a torch SDPA that torch's own switch alone holds to AVX2, and beside one
whose libraries are held to it too. render.py shows the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from attention_peers import backward_pass, forward_pass, implementations, random_inputs
from command_line import CPU, positive_integers, say, write_document
from machine_rates import bench_module, multiply_rates, peaks_by_dtype
from rounds import sample_in_rounds

import sightline as sl
from sightline.cli.environment import instruction_sets
from sightline.cli.measure import Spread, attention_flops, seconds_of

SCHEMA = "sightline-options/1"
WEIGHTINGS: dict[str, sl.Softmax | sl.Softplus] = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
FIRST_WIDTH, OTHER_WIDTHS = 128, (64, 80, 96, 256)
WINDOW, SHORT_WINDOWED_LENGTH = 256, 1024
MASKED_KEY_EVERY = 16  # so that no tile of keys is without one
BACKWARD_OPERATIONS = 2.5  # of the forward pass's: five products instead of two
# What holds a process to AVX2, by measurement. torch's own switch leaves alone the libraries that multiply for it: left
# to themselves they use AVX-512.
TORCH_SWITCH = {"ATEN_CPU_CAPABILITY": "avx2", "SIGHTLINE_ISA": "avx2"}
AVX2_SETTINGS = {
    "avx2_by_switch": TORCH_SWITCH,
    "avx2": TORCH_SWITCH | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@dataclass(frozen=True)
class Variant:
    """One call of a group, the useful floating-point operations in it, and its threads (0: all)."""

    name: str
    run: Callable[[], object]
    flops: float
    threads: int = 0


@dataclass(frozen=True)
class Group:
    """Calls that take turns; the rate of each is divided by that of the first."""

    measurement: str
    case: dict[str, Any]
    variants: list[Variant]


def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs of causal attention, every query seeing itself and at most `window` keys before it.

    Example:
        >>> visible_pairs(4), visible_pairs(4, window=1)
        (10, 7)
    """
    seen = length if window is None else min(length, window + 1)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def options_of(heads: int, length: int) -> dict[str, dict[str, Any]]:
    """Arguments that leave the number of products as it is."""
    generator = torch.Generator().manual_seed(2)
    key_mask = torch.ones(1, length, dtype=torch.bool)
    key_mask[:, ::MASKED_KEY_EVERY] = False
    entries = torch.randn(1, 1, length, length, generator=generator)
    return {
        "key_mask": {"key_mask": key_mask},
        "boolean attn_mask": {"attn_mask": entries < 1.5},
        "float attn_mask": {"attn_mask": entries},
        "alibi_slopes": {"alibi_slopes": torch.logspace(-1, -8, heads, base=2.0)},
    }


def option_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """Masks, ALiBi and grouped queries beside the plain call."""
    heads, length, width = options.heads, options.length, options.head_dim
    query, key, value = random_inputs(heads, length, width, dtype, CPU)
    attend = partial(sl.attention, weighting=WEIGHTINGS[weighting], causal=True)
    flops = attention_flops(heads, length, width, width)
    variants = [Variant("plain", forward_pass(attend, (query, key, value)), flops)]
    for name, extra in options_of(heads, length).items():
        variants.append(Variant(name, forward_pass(partial(attend, **extra), (query, key, value)), flops))
    if heads % 4 == 0:
        grouped = (query, key[:, : heads // 4].contiguous(), value[:, : heads // 4].contiguous())
        variants.append(Variant("4 query heads per key head", forward_pass(attend, grouped), flops))
    yield Group("options", {"length": length, "head_dim": width}, variants)


def width_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """Other widths beside D = 128."""
    attend = partial(sl.attention, weighting=WEIGHTINGS[weighting], causal=True)
    variants = []
    for width in (FIRST_WIDTH, *OTHER_WIDTHS):
        inputs = random_inputs(options.heads, options.length, width, dtype, CPU)
        flops = attention_flops(options.heads, options.length, width, width)
        variants.append(Variant(f"D = {width}", forward_pass(attend, inputs), flops))
    yield Group("widths", {"length": options.length, "head_dim": FIRST_WIDTH}, variants)


def window_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """The same window at two lengths: where the cost follows the window, the rate over visible pairs stays."""
    width, attend = options.head_dim, partial(sl.attention, weighting=WEIGHTINGS[weighting], causal=True)
    windowed = partial(attend, window=(WINDOW, 0))
    variants = []
    for length in sorted({SHORT_WINDOWED_LENGTH, 4 * options.length}):
        flops = 4 * options.heads * visible_pairs(length, WINDOW) * width
        call = forward_pass(windowed, random_inputs(options.heads, length, width, dtype, CPU))
        variants.append(Variant(f"N = {length:,}", call, flops))
    yield Group("window", {"length": 4 * options.length, "head_dim": width, "window": WINDOW}, variants)


def thread_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """All threads beside one: both passes, many heads, and one head, whose work can only be shared within it."""
    most, width = torch.get_num_threads(), options.head_dim
    if most == 1:
        return
    attend = partial(sl.attention, weighting=WEIGHTINGS[weighting], causal=True)
    for heads in (options.heads, 1):
        inputs = random_inputs(heads, options.length, width, dtype, CPU)
        flops = attention_flops(heads, options.length, width, width)
        passes = {"forward": (forward_pass, flops), "backward": (backward_pass, flops * BACKWARD_OPERATIONS)}
        for direction, (prepare, operations) in passes.items():
            call = prepare(attend, inputs)
            variants = [
                Variant(f"threads: {threads}", partial(run_on, threads, call), operations, threads)
                for threads in (1, most)
            ]
            case = {"length": options.length, "head_dim": width, "heads": heads, "pass": direction}
            yield Group("threads", case, variants)


def run_on(threads: int, call: Callable[[], object]) -> None:
    """One call on so many of torch's threads."""
    most = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
    finally:
        torch.set_num_threads(most)


def sdpa_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """Beside torch SDPA, under the instruction set of this process."""
    peers, chosen = implementations(causal=True), instruction_sets()["chosen"]
    for width in options.avx2_head_dims:
        inputs = random_inputs(options.heads, options.length, width, dtype, CPU)
        flops = attention_flops(options.heads, options.length, width, width)
        variants = [Variant(name, forward_pass(peers[name], inputs), flops) for name in ("sdpa", weighting)]
        yield Group("avx2", {"length": options.length, "head_dim": width, "instruction_set": chosen}, variants)


GROUPS = {
    "options": option_groups,
    "widths": width_groups,
    "window": window_groups,
    "threads": thread_groups,
    "avx2": sdpa_groups,
}


def time_group(group: Group, repetitions: int, limit: float = math.inf) -> list[dict[str, Any]]:
    """Seconds of every variant in turns, with its rate relative to the first one's (None where that one failed).

    limit: about so many seconds, at the cost of repetitions.
    """
    runs = {variant.name: partial(seconds_of, variant.run, CPU) for variant in group.variants}
    samples = sample_in_rounds(runs, repetitions, limit)
    rates: list[float | None] = []
    found = []
    for variant in group.variants:
        result = {"measurement": group.measurement, **group.case, "variant": variant.name}
        result |= {"threads": variant.threads or torch.get_num_threads(), "error": samples.errors.get(variant.name)}
        rates.append(None)
        if variant.name not in samples.errors:
            spread = Spread.of(samples.values[variant.name])
            rate = rates[-1] = variant.flops / spread.median / 1e9
            relative = None if rates[0] is None else rate / rates[0]
            result |= {"repetitions": len(samples.values[variant.name]), "seconds": asdict(spread)}
            result |= {"gflops": rate, "relative_rate": relative}
        found.append(result)
    return found


def register_peaks() -> dict[int, dict[str, float]]:
    """GFLOP/s by number of threads and dtype under the instruction set of this process; none without a bench module."""
    try:
        bench = bench_module()
    except FileNotFoundError as error:
        say(f"no shares of peak: {error}")
        return {}
    isa = instruction_sets()["chosen"]
    counts = sorted({1, torch.get_num_threads()})
    return {threads: peaks_by_dtype(multiply_rates(bench, isa, threads, 0.2)) for threads in counts}


def measure(options: argparse.Namespace, measurements: list[str]) -> list[dict[str, Any]]:
    """All groups of these measurements, with shares of the machine's peak, which is measured first."""
    peaks = register_peaks()
    found = []
    for measurement in measurements:
        for dtype in options.dtypes:
            for weighting in options.weightings:
                say(f"{measurement}, {dtype}, {weighting}")
                for group in GROUPS[measurement](options, getattr(torch, dtype), weighting):
                    group.case.update({"dtype": dtype, "weighting": weighting, "heads": options.heads} | group.case)
                    results = time_group(group, options.repetitions, options.seconds_per_group)
                    for result in results:
                        if peaks and result["error"] is None:
                            result["share_of_peak"] = result["gflops"] / peaks[result["threads"]][dtype]
                    found += results
    return found


def measure_under_avx2(options: argparse.Namespace, setting: str) -> list[dict[str, Any]]:
    """The measurement "avx2" in a process that is held to AVX2 in one of two ways, under that way's name."""
    environment = {**os.environ, **AVX2_SETTINGS[setting]}
    widths = ",".join(map(str, options.avx2_head_dims))
    sizes = ["--heads", str(options.heads), "--length", str(options.length), "--avx2-head-dims", widths]
    lists = ["--dtypes", ",".join(options.dtypes), "--weightings", ",".join(options.weightings)]
    rest = ["--repetitions", str(options.repetitions), "--seconds-per-group", str(options.seconds_per_group)]
    rest += ["--threads", str(torch.get_num_threads()), "--measurements", "avx2", "--child"]
    command = [sys.executable, __file__, *sizes, *lists, *rest]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [result | {"measurement": setting} for result in json.loads(output)]


def names_among(known: list[str], text: str) -> list[str]:
    """Names separated by commas, every one of them known."""
    names = text.split(",")
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text}")
    return names


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what options of attention cost on the CPU and write JSON.")
    parser.add_argument("--measurements", type=partial(names_among, list(GROUPS)), default=list(GROUPS))
    parser.add_argument("--weightings", type=partial(names_among, list(WEIGHTINGS)), default=list(WEIGHTINGS))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="N; windows are measured at four times that")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--avx2-head-dims", type=positive_integers, default=[64, 128], metavar="D,D,...")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seconds-per-group", type=float, default=10.0, help="long calls are repeated less often")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--name", help="name of the result file, by default from device and instruction set")
    parser.add_argument("--child", action="store_true", help="print the results instead of writing a file")
    return parser.parse_args(given)


def main() -> None:
    """Measure everything asked for and write one JSON file into benchmarks/results."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(options, options.measurements)))
        return
    timings = measure(options, [name for name in options.measurements if name != "avx2"])
    if "avx2" in options.measurements and "avx2" in instruction_sets()["available"]:
        for setting in AVX2_SETTINGS:
            timings += measure_under_avx2(options, setting)
    write_document(SCHEMA, {"timings": timings}, name=options.name)


if __name__ == "__main__":
    main()
