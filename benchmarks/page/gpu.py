"""What a GPU check found."""

from __future__ import annotations

from typing import Any

from gpu import summary

from page.markdown import described, markdown_table


def gpu_section(document: dict[str, Any]) -> list[str]:
    """One `make gpu-check`: its targets, its tests, and every case."""
    findings = document["findings"]
    counts = summary.test_counts(findings)
    steps = ", ".join(
        f"{key}: {step['status']}" for key, step in document["steps"].items() if step["status"] != "passed"
    )
    lines = [f"## GPU check on {document['device']['name']}", "", *described(document)]
    lines += markdown_table(summary.TARGET_HEADER, summary.target_rows(findings), 4)
    lines += ["Tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".", ""]
    lines += [f"Steps that did not pass: {steps}.", ""] if steps else []
    peaks = findings.get("peaks", {})
    if "copy" in peaks:
        rates = [f"{found['tflops']:,.0f} TFLOP/s in {name}" for name, found in peaks.items() if "tflops" in found]
        copied = f"{peaks['copy']['gigabytes_per_second']:,.0f} GB/s read and written by a copy"
        lines += [f"Measured peaks: {', '.join([*rates, copied])}.", ""]
    skips = summary.skip_rows(findings)
    if skips:
        lines += markdown_table(["tile skipping of LSSAR, inference", "tiles left out", "x no skipping"], skips)
    tiles = summary.tile_rows(findings)
    if tiles:
        lines += markdown_table(["tuned kernel", "tile (rows x keys)"], tiles)
    header = ["case", "implementation", "ms", "x fastest SDPA", "rate", "of peak"]
    for direction in ("forward", "backward", "forward+backward", "decode"):
        rows = summary.case_rows(findings, direction)
        if rows:
            lines += [f"### {direction.capitalize()}", "", *markdown_table(header, rows, 2)]
    return lines
