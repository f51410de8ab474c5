"""What a GPU check found against what it should find: the table of targets, and the tables of docs/performance.md.

Reads the document alone and imports nothing but the names of the cases, so that any machine can render it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu.cases import OURS, RECURRENCE, SDPA, Case, groups
from gpu.watch import given_up

SCHEMA = "sightline-gpu/1"
UNMEASURED = "unmeasured"
_TARGET_LENGTHS = range(4096, 65537)
_DECODE_LENGTH = 32768


@dataclass(frozen=True)
class Measured:
    """What was found for a target: (number, the case it comes from), and how many cases there are to measure."""

    numbers: list[tuple[float, str]]
    planned: int


@dataclass(frozen=True)
class Target:
    """A bound, None where the number is only reported, and how the numbers that it bounds are found.

    `choose` picks the number that is compared: the worst of ratios, the best of rates.
    """

    text: str
    bound: float | None
    unit: str
    find: Callable[[dict[str, Any]], Measured]
    choose: Callable[[Sequence[tuple[float, str]]], tuple[float, str]] = min

    def row(self, findings: dict[str, Any]) -> tuple[str, str, str, str]:
        """(target, bound, measured and where, yes or no); no verdict before every case is measured."""
        found = self.find(findings)
        bound = "reported" if self.bound is None else f"at least {self.bound:g} {self.unit}".rstrip()
        if not found.numbers:
            return self.text, bound, UNMEASURED, ""
        number, where = self.choose(found.numbers)
        shown = f"{number:.0f}" if number >= 100 else f"{number:.2f}"
        complete = len(found.numbers) >= found.planned
        measured = f"{shown} {self.unit}".rstrip() + f" ({where}; {len(found.numbers)} of {found.planned} cases)"
        verdict = "" if self.bound is None or not complete else "yes" if number >= self.bound else "no"
        return self.text, bound, measured, verdict


def _median(result: dict[str, Any] | None) -> float | None:
    return None if result is None or "seconds" not in result else float(result["seconds"]["median"])


def _fastest(results: dict[str, Any], names: Iterable[str]) -> float | None:
    times = [time for name in names if (time := _median(results.get(name))) is not None]
    return min(times, default=None)


def _cases(findings: dict[str, Any], direction: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for case in findings.get("cases", {}).values():
        if case["direction"] == direction and case["dtype"] == "bfloat16":
            yield case["label"], case


def _planned(direction: str, names: Sequence[str], others: Sequence[str] = ()) -> Iterator[tuple[Case, str]]:
    """Every case in bf16 that is to be measured for each of `names`, and for any of `others` where there are some."""
    for group in groups():
        if not others or any(other in group.implementations for other in others):
            for case in group.cases:
                if case.direction == direction and case.dtype == "bfloat16":
                    yield from ((case, name) for name in names if name in group.implementations)


def smallest_ratio(direction: str, names: Sequence[str], others: Sequence[str]) -> Callable[[dict[str, Any]], Measured]:
    """The speed of each of `names` relative to the fastest of `others`, over the lengths of the targets."""
    planned = sum(case.length in _TARGET_LENGTHS for case, _ in _planned(direction, names, others))

    def find(findings: dict[str, Any]) -> Measured:
        ratios = []
        for case_name, case in _cases(findings, direction):
            fastest = _fastest(case["results"], others)
            for name in names:
                time = _median(case["results"].get(name))
                if fastest is not None and time is not None and case["length"] in _TARGET_LENGTHS:
                    ratios.append((fastest / time, f"{name}, {case_name}"))
        return Measured(ratios, planned)

    return find


def best_rate(direction: str, name: str, head_dim: int, field: str) -> Callable[[dict[str, Any]], Measured]:
    """The rates of an implementation at one head width."""
    planned = sum(case.head_dim == head_dim for case, _ in _planned(direction, (name,)))

    def find(findings: dict[str, Any]) -> Measured:
        rates = [
            (case["results"][name][field], case_name)
            for case_name, case in _cases(findings, direction)
            if head_dim == case["head_dim"] and field in case["results"].get(name, {})
        ]
        return Measured(rates, planned)

    return find


def bandwidth_share(names: Sequence[str]) -> Callable[[dict[str, Any]], Measured]:
    """The shares of the measured copy bandwidth that decoding reaches, at 32,768 keys and more."""
    planned = sum(case.length >= _DECODE_LENGTH for case, _ in _planned("decode", names))

    def find(findings: dict[str, Any]) -> Measured:
        copy = findings.get("peaks", {}).get("copy", {}).get("gigabytes_per_second")
        shares = [
            (case["results"][name]["gigabytes_per_second"] / copy, f"{name}, {case_name}")
            for case_name, case in _cases(findings, "decode")
            for name in names
            if copy and case["length"] >= _DECODE_LENGTH and "gigabytes_per_second" in case["results"].get(name, {})
        ]
        return Measured(shares, planned)

    return find


def recorded_share(findings: dict[str, Any]) -> Measured:
    """The share of tiles that re-weighting leaves out on recorded keys."""
    shares = [
        (found["skipped_share"], name)
        for name, found in findings.get("skips", {}).items()
        if name.startswith("recorded") and found["skipped_share"] is not None
    ]
    return Measured(shares, 1)


def _ratio_target(text: str, bound: float, direction: str, names: Sequence[str], others: Sequence[str]) -> Target:
    return Target(text, bound, "", smallest_ratio(direction, names, others))


def _rate_target(text: str, bound: float, direction: str, name: str) -> Target:
    return Target(f"{text}, D = 128", bound, "TFLOP/s", best_rate(direction, name, 128, "tflops"), max)


TARGETS = (
    _ratio_target("Softmax and LSSA forward, x the fastest SDPA", 0.8, "forward", OURS[:2], SDPA),
    _ratio_target("Softmax and LSSA backward, x the fastest SDPA, deterministic", 0.65, "backward", OURS[:2], SDPA),
    _rate_target("Softmax forward", 515, "forward", "softmax"),
    _rate_target("LSSA forward", 515, "forward", "lssa"),
    _rate_target("Softmax backward", 370, "backward", "softmax"),
    _rate_target("LSSA backward", 370, "backward", "lssa"),
    _ratio_target("LSSAR forward on random data, x LSSA", 0.5, "forward", OURS[2:], OURS[1:2]),
    Target("LSSAR forward on recorded keys, share of tiles left out", None, "", recorded_share),
    *(
        _ratio_target(f"{text} {direction}, x FlexAttention", 1.3, direction, (name,), (f"flex-{name}",))
        for direction in ("forward", "backward")
        for text, name in (("Softmax", "softmax"), ("LSSA", "lssa"))
    ),
    Target(
        "CUDA decoding, share of copy bandwidth",
        0.85,
        "",
        bandwidth_share(("cuda-softmax", "cuda-lssa")),
    ),
    Target(
        "CUDA decoding of LSSAR, share of copy bandwidth",
        0.85,
        "",
        bandwidth_share(("cuda-lssar",)),
    ),
    _ratio_target(
        "Additive recurrence, forward and backward, x flash-linear-attention",
        2.0,
        "forward+backward",
        RECURRENCE[:1],
        RECURRENCE[1:],
    ),
)
TARGET_HEADER = ("target (bf16, N = 4K to 64K; of ratios the worst case)", "bound", "measured", "met")


def target_rows(findings: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of targets; without findings every one of them is unmeasured."""
    return [target.row(findings) for target in TARGETS]


def test_counts(findings: dict[str, Any]) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for test in findings.get("tests", {}).values():
        counts[test["outcome"]] += 1
    return counts


def skip_rows(findings: dict[str, Any]) -> list[list[str]]:
    """Tiles left out by re-weighting: kind of keys, share, and the whole call's speed-up over visiting all."""
    return [
        [name, "" if found["skipped_share"] is None else f"{found['skipped_share']:.0%}", f"{found['gain']:.2f}"]
        for name, found in findings.get("skips", {}).items()
    ]


def tile_rows(findings: dict[str, Any]) -> list[list[str]]:
    """The tiles that tuning chose, and whether they load by tensor descriptors or are specialised."""
    return [[name, found["text"]] for name, found in findings.get("tiles", {}).items()]


def text_table(document: dict[str, Any]) -> str:
    """The short table that ends a check."""
    findings, steps = document["findings"], document["steps"]
    rows = target_rows(findings)
    width = max(len(row[0]) for row in rows)
    lines = ["", f"{document['device']['name']}: targets of bf16 at N = 4K to 64K, the worst case of each"]
    lines += [f"  {row[0]:<{width}}  {row[1]:<22}{row[3] or '':<5}{row[2]}" for row in rows]
    lines += [f"  LSSAR, {name}: {share} of tiles skipped, x{gain}" for name, share, gain in skip_rows(findings)]
    lines += [f"  tuned {name}: {tile}" for name, tile in tile_rows(findings)]
    counts = test_counts(findings)
    lines.append("tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    failures = [(name, test) for name, test in findings.get("tests", {}).items() if test["outcome"] == "failed"]
    lines += [f"  failed: {name} (SIGHTLINE_TEST_SEED={test.get('seed')})" for name, test in failures[:20]]
    lines += [f"  lost: {name} ({why})" for name, why in given_up(findings).items()]
    lines += [f"  {key}: {step['status']}" for key, step in steps.items() if step["status"] != "passed"]
    return "\n".join(lines)


def case_rows(findings: dict[str, Any], direction: str) -> list[list[str]]:
    """One row per implementation and case of a direction: case, name, ms, ratio to the fastest SDPA, rate, share."""
    rows = []
    peaks = findings.get("peaks", {})
    for case in findings.get("cases", {}).values():
        if case["direction"] != direction:
            continue
        case_name = case["label"]
        fastest = _fastest(case["results"], SDPA)
        for name, result in case["results"].items():
            time = _median(result)
            if time is None:
                rows.append([case_name, name, f"left out: {result['error']}", "", "", ""])
                continue
            rate, unit = (
                (result["gigabytes_per_second"], "GB/s") if direction == "decode" else (result["tflops"], "TFLOP/s")
            )
            peak = peaks.get("copy", {}).get("gigabytes_per_second")
            if direction != "decode":
                peak = peaks.get(case["dtype"], {}).get("tflops")
            rows.append(
                [
                    case_name,
                    name,
                    f"{time * 1e3:.3g}",
                    "" if fastest is None else f"{fastest / time:.2f}",
                    f"{rate:,.0f} {unit}",
                    "" if not peak else f"{rate / peak:.0%}",
                ]
            )
    return rows
