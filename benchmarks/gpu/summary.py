"""What a GPU check found against what it should find: the table of targets, and the tables of docs/performance.md.

Reads the document alone and imports nothing but the names of the cases, so that any machine can render it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu.cases import OURS, SDPA

SCHEMA = "sightline-gpu/1"
UNMEASURED = "unmeasured"
_TARGET_LENGTHS = range(4096, 65537)

Cases = dict[str, dict[str, Any]]
Worst = tuple[float, str] | None  # a number and the case it comes from


@dataclass(frozen=True)
class Target:
    """A bound, and how the number that it bounds is found among the cases."""

    text: str
    bound: float
    unit: str
    find: Callable[[dict[str, Any]], Worst]

    def row(self, findings: dict[str, Any]) -> tuple[str, str, str, str]:
        """(target, bound, measured and where, yes or no)."""
        found = self.find(findings)
        bound = f"at least {self.bound:g} {self.unit}".rstrip()
        if found is None:
            return self.text, bound, UNMEASURED, ""
        number, where = found
        shown = f"{number:.0f}" if number >= 100 else f"{number:.2f}"
        return (
            self.text,
            bound,
            f"{shown} {self.unit}".rstrip() + f" ({where})",
            "yes" if number >= self.bound else "no",
        )


def _median(result: dict[str, Any] | None) -> float | None:
    return None if result is None or "seconds" not in result else float(result["seconds"]["median"])


def _fastest(results: dict[str, Any], names: Iterable[str]) -> float | None:
    times = [time for name in names if (time := _median(results.get(name))) is not None]
    return min(times, default=None)


def _cases(findings: dict[str, Any], direction: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for case in findings.get("cases", {}).values():
        if case["direction"] == direction and case["dtype"] == "bfloat16":
            yield case["label"], case


def smallest_ratio(direction: str, names: Sequence[str], others: Sequence[str]) -> Callable[[dict[str, Any]], Worst]:
    """The smallest speed of any of `names` relative to the fastest of `others`, over the lengths of the targets."""

    def find(findings: dict[str, Any]) -> Worst:
        ratios = []
        for case_name, case in _cases(findings, direction):
            fastest = _fastest(case["results"], others)
            for name in names:
                time = _median(case["results"].get(name))
                if fastest is not None and time is not None and case["length"] in _TARGET_LENGTHS:
                    ratios.append((fastest / time, f"{name}, {case_name}"))
        return min(ratios, default=None)

    return find


def best_rate(direction: str, name: str, head_dim: int | None, field: str) -> Callable[[dict[str, Any]], Worst]:
    """The best rate of an implementation, of one head width or of any."""

    def find(findings: dict[str, Any]) -> Worst:
        rates = [
            (case["results"][name][field], case_name)
            for case_name, case in _cases(findings, direction)
            if head_dim in (None, case["head_dim"]) and field in case["results"].get(name, {})
        ]
        return max(rates, default=None)

    return find


def bandwidth_share(names: Sequence[str]) -> Callable[[dict[str, Any]], Worst]:
    """The smallest share of the measured copy bandwidth that decoding reaches, at 32,768 keys and more."""

    def find(findings: dict[str, Any]) -> Worst:
        copy = findings.get("peaks", {}).get("copy", {}).get("gigabytes_per_second")
        shares = [
            (case["results"][name]["gigabytes_per_second"] / copy, f"{name}, {case_name}")
            for case_name, case in _cases(findings, "decode")
            for name in names
            if copy and case["length"] >= 32768 and "gigabytes_per_second" in case["results"].get(name, {})
        ]
        return min(shares, default=None)

    return find


TARGETS = (
    Target("Softmax and LSSA forward, x the fastest SDPA", 0.8, "", smallest_ratio("forward", OURS[:2], SDPA)),
    Target(
        "Softmax and LSSA backward, x the fastest SDPA, deterministic",
        0.65,
        "",
        smallest_ratio("backward", OURS[:2], SDPA),
    ),
    Target("Softmax forward, D = 128", 515, "TFLOP/s", best_rate("forward", "softmax", 128, "tflops")),
    Target("LSSA forward, D = 128", 515, "TFLOP/s", best_rate("forward", "lssa", 128, "tflops")),
    Target("Softmax backward, D = 128", 370, "TFLOP/s", best_rate("backward", "softmax", 128, "tflops")),
    Target("LSSA backward, D = 128", 370, "TFLOP/s", best_rate("backward", "lssa", 128, "tflops")),
    Target("LSSAR forward on random data, x LSSA", 0.5, "", smallest_ratio("forward", OURS[2:], OURS[1:2])),
    Target("Softmax forward, x FlexAttention", 1.3, "", smallest_ratio("forward", ("softmax",), ("flex-softmax",))),
    Target("LSSA forward, x FlexAttention", 1.3, "", smallest_ratio("forward", ("lssa",), ("flex-lssa",))),
    Target("LSSA backward, x FlexAttention", 1.3, "", smallest_ratio("backward", ("lssa",), ("flex-lssa",))),
    Target("CUDA decoding, share of copy bandwidth", 0.85, "", bandwidth_share(("cuda-softmax", "cuda-lssa"))),
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
