"""The additive recurrence beside its peers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from page.markdown import described, markdown_table, milliseconds

RECURRENCE_TABLES = {
    "causal": ("Causal forward pass", "x the recurrence's time"),
    "unordered": ("Forward pass over the whole sequence", "x the recurrence's time"),
    "backward": ("Causal backward pass", "x the forward pass's time"),
    "unordered backward": ("Backward pass over the whole sequence", "x the forward pass's time"),
    "one head, causal": ("One head, causal forward pass, two threads against one", "x the time of two threads"),
    "one head, causal backward": (
        "One head, causal backward pass, two threads against one",
        "x the time of two threads",
    ),
    "one head, unordered": (
        "One head, forward pass without order, two threads against one",
        "x the time of two threads",
    ),
    "one head, unordered backward": (
        "One head, backward pass without order, two threads against one",
        "x the time of two threads",
    ),
    "decoding": ("One token, with its state", "x the recurrence's time"),
    "decoding in layers": ("One token through the recurrences of several layers", "x the recurrence's time"),
    "length": ("Causal forward pass by length", "x the recurrence's time"),
}
RECURRENCE_LABELS = {
    "recurrence": "sightline additive_recurrence",
    "formula": "chunked formula in PyTorch",
    "sdpa": "torch SDPA",
    "products": "its two matrix products",
    "forward": "forward",
    "backward": "backward",
    "two threads": "two threads",
    "one thread": "one thread",
    "memory": "reading and writing the state",
    "recurrence call": "additive_recurrence on a state of one number",
    "memory call": "reading and writing one number",
}


def rates_of_the_run(document: dict[str, Any]) -> list[str]:
    """What the machine multiplied and read at the start of every sweep, least and most."""
    rates = document.get("machine_rates")
    if not rates:
        return []

    def span(numbers: Iterable[float]) -> str:
        found = sorted(numbers)
        least, most = (f"{number:,.0f}" for number in (found[0], found[-1]))
        return least if least == most else f"{least} - {most}"

    multiplied = ", ".join(
        f"{span(rate['multiply_gflops'][operands] for rate in rates)} GFLOP/s of {operands}"
        for operands, most in rates[0]["multiply_gflops"].items()
        if most
    )
    read = span(rate["read_gigabytes_per_second"] for rate in rates)
    return [f"At the start of its sweeps the machine multiplied {multiplied} in registers and read {read} GB/s.", ""]


def recurrence_section(document: dict[str, Any]) -> list[str]:
    """One run of recurrence_ratio.py."""
    lines = [f"## Additive recurrence on {document['device']['name']}", "", *described(document)]
    lines += rates_of_the_run(document)
    for measurement, (title, ratio) in RECURRENCE_TABLES.items():
        rows = []
        for result in document["timings"]:
            if result["measurement"] != measurement:
                continue
            shape = f"B = {result.get('batch', 1)}, H = {result['heads']}, D = {result['width']}"
            if "layers" in result:
                shape += f", {result['layers']} layers"
            row = [f"{result['dtype']}, {shape}, N = {result['length']:,}", RECURRENCE_LABELS[result["implementation"]]]
            if result.get("error"):
                row += [f"left out: {result['error']}", "", ""]
            else:
                seconds = result["seconds"]
                row += [milliseconds(seconds, result.get("repetitions"))]
                row += [f"{seconds['median'] / result['length'] * 1e6:.2f}", f"{result['ratio']:.2f}"]
            rows.append(row)
        header = ["case", "implementation", "ms (p10 - p90)", "us per token", ratio]
        if rows:
            lines += [f"### {title}", "", *markdown_table(header, rows, 2)]
    for found in document["memory"]:
        shape = f"{found['dtype']}, H = {found['heads']}, D = {found['width']}, N = {found['length']:,}"
        amount = (
            f"left out: {found['error']}" if found.get("error") else f"{found['beyond_output_bytes'] / 2**20:.1f} MiB"
        )
        lines += [f"Peak memory of a causal forward pass beyond its output, {shape}: {amount}.", ""]
    return lines
