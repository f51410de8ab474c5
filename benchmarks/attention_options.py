"""What options, widths, threads and a narrower instruction set cost attention on the CPU, as committed JSON.

    python benchmarks/attention_options.py --length 4096 --dtypes float32,bfloat16

Every group of calls takes turns in one process, and each result stands beside the first of its group: masks beside the
plain call, every width beside D = 128, one thread beside all, a window at a long length beside the same at a short one.
AVX2 is measured in a child process, beside a torch SDPA that is held to AVX2 too. render.py shows the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from attention_peers import forward_pass, implementations, random_inputs
from command_line import CPU, say, write_document

import sightline as sl
from sightline.cli.environment import instruction_sets
from sightline.cli.measure import Spread, attention_flops, interleave, seconds_of
from sightline.cli.peak_memory import describe_error

SCHEMA = "sightline-options/1"
WEIGHTINGS: dict[str, sl.Softmax | sl.Softplus] = {"softmax": sl.Softmax(), "lssa": sl.LSSA(), "lssar": sl.LSSAR()}
FIRST_WIDTH, OTHER_WIDTHS = 128, (64, 80, 96, 256)
WINDOW, SHORT_WINDOWED_LENGTH = 256, 1024
MASKED_KEY_EVERY = 16  # so that no tile of keys is without one


@dataclass(frozen=True)
class Variant:
    """One call of a group, and the useful floating-point operations in it."""

    name: str
    run: Callable[[], object]
    flops: float


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
    """All threads beside one."""
    most, width = torch.get_num_threads(), options.head_dim
    if most == 1:
        return
    inputs = random_inputs(options.heads, options.length, width, dtype, CPU)
    call = forward_pass(partial(sl.attention, weighting=WEIGHTINGS[weighting], causal=True), inputs)

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            call()
        finally:
            torch.set_num_threads(most)

    flops = attention_flops(options.heads, options.length, width, width)
    variants = [Variant(f"threads: {threads}", partial(on, threads), flops) for threads in (1, most)]
    yield Group("threads", {"length": options.length, "head_dim": width}, variants)


def sdpa_groups(options: argparse.Namespace, dtype: torch.dtype, weighting: str) -> Iterator[Group]:
    """Beside torch SDPA, under the instruction set of this process."""
    width = options.head_dim
    inputs = random_inputs(options.heads, options.length, width, dtype, CPU)
    flops = attention_flops(options.heads, options.length, width, width)
    peers = implementations(causal=True)
    variants = [Variant(name, forward_pass(peers[name], inputs), flops) for name in ("sdpa", weighting)]
    chosen = instruction_sets()["chosen"]
    yield Group("avx2", {"length": options.length, "head_dim": width, "instruction_set": chosen}, variants)


GROUPS = {
    "options": option_groups,
    "widths": width_groups,
    "window": window_groups,
    "threads": thread_groups,
    "avx2": sdpa_groups,
}


def time_group(group: Group, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of every variant in turns, with its rate relative to the first one's (None where that one failed)."""
    runs = {variant.name: partial(seconds_of, variant.run, CPU) for variant in group.variants}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    for turn, name, sample in interleave(runs, dict.fromkeys(runs, repetitions + 1)):
        if isinstance(sample, Exception):
            errors[name] = describe_error(sample)
        elif turn > 1:  # the first round warms up
            samples[name].append(sample)
    rates: list[float | None] = []
    found = []
    for variant in group.variants:
        result = {"measurement": group.measurement, **group.case, "variant": variant.name}
        result["error"] = errors.get(variant.name)
        rates.append(None)
        if variant.name not in errors:
            spread = Spread.of(samples[variant.name])
            rate = rates[-1] = variant.flops / spread.median / 1e9
            relative = None if rates[0] is None else rate / rates[0]
            result |= {"seconds": asdict(spread), "gflops": rate, "relative_rate": relative}
        found.append(result)
    return found


def measure(options: argparse.Namespace, measurements: list[str]) -> list[dict[str, Any]]:
    """All groups of these measurements."""
    found = []
    for measurement in measurements:
        for dtype in options.dtypes:
            for weighting in options.weightings:
                say(f"{measurement}, {dtype}, {weighting}")
                for group in GROUPS[measurement](options, getattr(torch, dtype), weighting):
                    group.case.update(dtype=dtype, weighting=weighting, heads=options.heads)
                    found += time_group(group, options.repetitions)
    return found


def measure_under_avx2(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The measurement "avx2" in a process in which both libraries are held to AVX2.

    torch's own switch leaves the libraries that multiply for it alone: left to themselves they use AVX-512.
    """
    held = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = {**os.environ, **held, "SIGHTLINE_ISA": "avx2"}
    sizes = ["--heads", str(options.heads), "--length", str(options.length), "--head-dim", str(options.head_dim)]
    lists = ["--dtypes", ",".join(options.dtypes), "--weightings", ",".join(options.weightings)]
    rest = ["--repetitions", str(options.repetitions), "--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, *sizes, *lists, *rest, "--measurements", "avx2", "--child"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


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
    parser.add_argument("--weightings", type=partial(names_among, list(WEIGHTINGS)), default=["softmax", "lssa"])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="N; windows are measured at four times that")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
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
        timings += measure_under_avx2(options)
    write_document(SCHEMA, {"timings": timings}, name=options.name)


if __name__ == "__main__":
    main()
