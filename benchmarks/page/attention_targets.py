"""The targets of attention on the CPU, and where they are found among the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from machine_rates import peaks_by_dtype

from page.markdown import LABELS
from page.targets import Documents, Measured, Target, percent, times, worst

PRODUCTS_OF_PARTS = 4  # of bfloat16, in place of one of float16 where there is a tile unit
DTYPES = ("bfloat16", "float32", "float16")
OURS = ("lssa", "softmax", "lssar")
TABLE_CASE = {"causal": True, "batch": 1, "heads": 8}  # of the ratios to torch SDPA
WIDTHS = (64, 128)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
FULL_LENGTHS = (1024, 4096)  # without causality
SHORT_LENGTHS, SHORT_BATCH = (64, 196, 512), 8
# Of every pass and dtype: how many times the speed of torch SDPA, in the order of `OURS`.
SDPA_RATIOS = {
    ("forward", "bfloat16"): (4.2, 4.0, 2.6),
    ("forward", "float32"): (2.4, 2.3, 1.5),
    ("forward", "float16"): (3.2, 3.0, 2.0),
    ("backward", "bfloat16"): (2.0, 2.0, 1.3),
    ("backward", "float32"): (1.8, 1.8, 1.1),
    ("backward", "float16"): (15.0, 15.0, 10.0),
}
DECODING_SHARES = {"lssa": 0.8, "softmax": 0.8, "lssar": 0.7}
DECODING_CASE = {"heads": 32, "key_heads": 8, "head_dim": 128, "length": 32768, "dtype": "bfloat16"}
# GFLOP/s of torch SDPA on the machine that the targets were set with, least and most.
SDPA_RATES = {
    ("forward", "bfloat16"): (150, 160),
    ("forward", "float32"): (150, 160),
    ("forward", "float16"): (100, 100),
    ("backward", "bfloat16"): (221, 267),
    ("backward", "float32"): (140, 153),
    ("backward", "float16"): (15, 15),
}
REGISTER_RATES = {"bfloat16": 1025, "float32": 515, "float16": 515}

Result = dict[str, Any]


def timings(documents: Documents, kind: str, **wanted: object) -> Iterator[Result]:
    """Results without an error that have these values."""
    for result in documents.get(kind, {}).get("timings", ()):
        if result["error"] is None and all(result.get(name) == value for name, value in wanted.items()):
            yield result


def numbers(found: Iterable[int]) -> str:
    """Lengths for a sentence."""
    return "N = " + ", ".join(f"{number:,}" for number in found)


def missing_lengths(measured: set[tuple[bool, int, int]], causal: bool, wanted: Iterable[int]) -> list[int]:
    """Lengths at which not every width was measured, of (causal, length, width)."""
    return [length for length in wanted if any((causal, length, width) not in measured for width in WIDTHS)]


def register_limit(documents: Documents, result: Result, bound: float) -> str:
    """Where that is less than wanted: the ratio to SDPA of a kernel that multiplies as fast as registers allow.

    Nothing where the kernel is faster than that, which takes other products than those of its dtype.
    """
    peaks = register_peaks(documents)
    peak = peaks.get(result["dtype"], math.inf)
    if result["dtype"] == "float16" and peaks.get("bfloat16", 0.0) > PRODUCTS_OF_PARTS * peak:
        return ""  # float16 is multiplied as parts of bfloat16 there
    sdpa = result["gflops"] / result["ratio_to_sdpa"]
    if peak / sdpa >= bound or result["gflops"] > peak:
        return ""
    products = "products of bfloat16" if result["dtype"] == "bfloat16" else "multiply-adds of float32"
    return f"SDPA has {sdpa:,.0f} GFLOP/s there, {products} in registers {peak:,.0f}: at most {times(peak / sdpa)}"


def register_peaks(documents: Documents) -> dict[str, float]:
    """GFLOP/s of the registers by dtype: of the run of the ratios, or else of that of the parts."""
    attention, parts = documents.get("attention", {}), documents.get("parts")
    if "register_gflops" in attention:
        return peaks_by_dtype(attention["register_gflops"])
    return {} if parts is None else peaks_by_dtype(parts["multiply_gflops"][str(parts["device"]["threads"])])


def sdpa_ratio(direction: str, dtype: str, name: str, bound: float) -> Callable[[Documents], Measured | None]:
    """The smallest ratio to SDPA over lengths and widths, causal, B = 1."""

    def find(documents: Documents) -> Measured | None:
        wanted = {"pass": direction, "dtype": dtype, "implementation": name} | TABLE_CASE
        results = [result for result in timings(documents, "attention", **wanted) if result["length"] in LENGTHS]
        missing = missing_lengths({(True, result["length"], result["head_dim"]) for result in results}, True, LENGTHS)
        return worst(
            Measured(
                result["ratio_to_sdpa"],
                f"D = {result['head_dim']}, N = {result['length']:,}; {result['share_of_peak']:.0%} of peak"
                f"{timed_once(result)}",
                register_limit(documents, result, bound),
                numbers(missing) if missing else "",
            )
            for result in results
        )

    return find


def zentorch_ratio(dtype: str, name: str, batch: int) -> Callable[[Documents], Measured | None]:
    """The smallest ratio to zentorch over patterns, lengths and widths."""
    wanted = {True: SHORT_LENGTHS, False: SHORT_LENGTHS} if batch > 1 else {True: LENGTHS, False: FULL_LENGTHS}

    def find(documents: Documents) -> Measured | None:
        results = [
            result
            for result in timings(
                documents, "attention", **{"pass": "forward"}, dtype=dtype, implementation=name, batch=batch
            )
            if "ratio_to_zentorch" in result
        ]
        measured = {(result["causal"], result["length"], result["head_dim"]) for result in results}
        missing = [
            f"{pattern}, {numbers(lengths)}"
            for causal, pattern in ((True, "causal"), (False, "all keys"))
            if (lengths := missing_lengths(measured, causal, wanted[causal]))
        ]
        return worst(
            Measured(
                result["ratio_to_zentorch"],
                f"{pattern_of(result)}, D = {result['head_dim']}, N = {result['length']:,}; "
                f"{result['share_of_peak']:.0%} of peak{timed_once(result)}",
                missing=" and ".join(missing),
            )
            for result in results
        )

    return find


def pattern_of(result: Result) -> str:
    """Causal or not."""
    return "causal" if result["causal"] else "all keys"


def timed_once(result: Result) -> str:
    """Said of a call so long that there was time for one: nothing tells how much such calls differ."""
    return "; timed once" if result["repetitions"] == 1 else ""


def slowest_beside_sdpa(documents: Documents) -> Measured | None:
    """The smallest ratio to SDPA of anything that was timed beside it: both passes, every shape, and decoding."""
    found = []
    for name in OURS:
        for result in timings(documents, "attention", implementation=name):
            shape = f"B = {result['batch']}, D = {result['head_dim']}, N = {result['length']:,}"
            where = f"{LABELS[name]}, {result['pass']}, {pattern_of(result)}, {result['dtype']}, {shape}"
            found.append(Measured(result["ratio_to_sdpa"], where + timed_once(result)))
        for result in timings(documents, "decoding", implementation=name):
            shape = f"H = {result['heads']} on {result['key_heads']}, N = {result['length']:,}"
            found.append(Measured(result["ratio_to_sdpa"], f"{LABELS[name]}, decoding, {result['dtype']}, {shape}"))
    return worst(found)


def decoding_share(name: str) -> Callable[[Documents], Measured | None]:
    """The share of what the same caches are read with; a sum of torch is slower, and no measure of it."""

    def find(documents: Documents) -> Measured | None:
        return worst(
            Measured(
                result["share_of_bandwidth"],
                f"{result['gigabytes_per_second']:.1f} of {result['read_gigabytes_per_second']:.1f} GB/s",
            )
            for result in timings(documents, "decoding", implementation=name, **DECODING_CASE)
            if "read_gigabytes_per_second" in result
        )

    return find


def relative_rate(measurement: str, keep: Callable[[Result], bool]) -> Callable[[Documents], Measured | None]:
    """The smallest rate relative to the first call of its group, over dtypes and weightings."""

    def find(documents: Documents) -> Measured | None:
        return worst(
            Measured(
                result["relative_rate"],
                f"{LABELS[result['weighting']]}, {result['dtype']}, {shape}N = {result['length']:,}"
                f"{timed_once(result)}",
            )
            for result in timings(documents, "options", measurement=measurement)
            for shape in ["" if measurement == "widths" else f"D = {result['head_dim']}, "]
            if result["relative_rate"] is not None and keep(result)
        )

    return find


def variant(name: str) -> Callable[[Result], bool]:
    """Results of this variant."""
    return lambda result: result["variant"] == name


def all_threads(direction: str, one_head: bool) -> Callable[[Result], bool]:
    """Results of all threads, of one pass, with one head or many."""
    return lambda result: (
        result["variant"] != "threads: 1" and result.get("pass") == direction and (result["heads"] == 1) == one_head
    )


def attention_targets() -> Iterator[Target]:
    """All of them, in the order of the table."""
    for (direction, dtype), bounds in SDPA_RATIOS.items():
        for name, bound in zip(OURS, bounds, strict=True):
            text = f"{direction}, {dtype}, {LABELS[name]}, speed of torch SDPA"
            yield Target(text, bound, sdpa_ratio(direction, dtype, name, bound), times)
    for name, share in DECODING_SHARES.items():
        text = f"decoding, bfloat16, {LABELS[name]}, H = 32 on 8, D = 128, N = 32,768, share of the read rate"
        yield Target(text, share, decoding_share(name), percent)
    for batch in (1, SHORT_BATCH):
        for dtype in ("bfloat16", "float32"):
            for name in OURS[:2]:
                text = f"forward, {dtype}, {LABELS[name]}, B = {batch}, speed of zentorch"
                yield Target(text, 1.15, zentorch_ratio(dtype, name, batch), times)
    yield Target("anything, speed of torch SDPA", 1.0, slowest_beside_sdpa, times)
    for name in OURS[:2]:
        switched = relative_rate("avx2_by_switch", variant(name))
        yield Target(
            f"AVX2 alone, {LABELS[name]}, speed of torch SDPA under ATEN_CPU_CAPABILITY=avx2", 1.2, switched, times
        )
    for option in ("key_mask", "boolean attn_mask", "float attn_mask", "alibi_slopes", "4 query heads per key head"):
        yield Target(f"{option}, share of the plain rate", 0.85, relative_rate("options", variant(option)), percent)
    for width in (80, 96, 256):
        rate = relative_rate("widths", variant(f"D = {width}"))
        yield Target(f"D = {width}, share of the rate at D = 128", 0.75, rate, percent)
    for direction in ("forward", "backward"):
        for one_head, heads in ((False, "many heads"), (True, "one head")):
            rate = relative_rate("threads", all_threads(direction, one_head))
            yield Target(f"all threads, {direction}, {heads}, speed of one thread", 1.85, rate, times)
    longer = relative_rate("window", lambda result: result["variant"] != "N = 1,024")
    yield Target("a window, rate over visible pairs, share of that at N = 1,024", 1.0, longer, percent)


def rates_of_sdpa(documents: Documents) -> list[list[str]]:
    """What the ratios are taken to, there and here: pass and dtype, SDPA's GFLOP/s, and the machine's own."""
    peaks = register_peaks(documents)
    rows = []
    for (direction, dtype), (least, most) in SDPA_RATES.items():
        wanted = {"pass": direction, "dtype": dtype, "implementation": "sdpa"} | TABLE_CASE
        here = [result["gflops"] for result in timings(documents, "attention", **wanted)]
        there = f"{least}" if least == most else f"{least} - {most}"
        measured = f"{min(here):,.0f} - {max(here):,.0f}" if here else ""
        own = f"{peaks[dtype]:,.0f}" if dtype in peaks else ""
        rows.append([f"{direction}, {dtype}", there, measured, f"{REGISTER_RATES[dtype]:,}", own])
    return rows
