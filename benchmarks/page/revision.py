"""The kernels beside those of an earlier revision."""

from __future__ import annotations

from typing import Any

from page.markdown import described, markdown_table, milliseconds


def revision_section(document: dict[str, Any]) -> list[str]:
    """One run of revision_ratio.py."""
    lines = [
        f"## Kernels beside those of revision {document['before']} on {document['device']['name']}",
        "",
        *described(document),
        f"{document['processes']} pairs of processes take turns, {document['rounds']} rounds each, one thread, B = 1, "
        "H = 8; attention is causal with D = 64, the recurrence has Dk = Dv = 128. The ratio is that of neighbouring "
        f"calls, above 1: now faster. Median of all cases: {document['median_ratio']:.3f}.",
        "",
    ]
    rows = [
        [
            f"{found['kernel']}, {found['direction']}, {found['dtype']}, N = {found['length']:,}",
            milliseconds(found["before"]),
            milliseconds(found["after"]),
            f"{found['ratio']['median']:.3f} ({found['ratio']['p10']:.2f} - {found['ratio']['p90']:.2f})",
        ]
        for found in document["timings"]
    ]
    return lines + markdown_table(
        ["case", "before, ms (p10 - p90)", "after, ms (p10 - p90)", "ratio (p10 - p90)"], rows
    )
