"""What the sections share: names, tables, and how a machine and a time are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

LABELS = {
    "eager": "eager",
    "sdpa": "torch SDPA",
    "softmax": "sightline Softmax",
    "lssa": "sightline LSSA",
    "lssar": "sightline LSSAR",
    "zentorch": "zentorch",
}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)] + [""]


def described(document: dict[str, Any]) -> list[str]:
    """Device, versions and command of one file."""
    device, isa = document["device"], document["instruction_set"]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items() if number)
    where = f"{device['name']}, {device['threads']} thread" + "s" * (device["threads"] != 1)
    if device["kind"] == "cpu":
        where += f", instruction set {isa['chosen']}"
    return [f"{where}; {versions}.", "", f"`{document['command']}`", ""]


def milliseconds(spread: dict[str, float], repetitions: int | None = None) -> str:
    """A spread of seconds as milliseconds: median (p10 - p90), or "once" in place of the percentiles."""
    times = (spread[part] * 1e3 for part in ("median", "p10", "p90"))
    median, low, high = (f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in times)
    return f"{median} (once)" if repetitions == 1 else f"{median} ({low} - {high})"
