"""Attention: ratios to its peers, decoding, what options cost, tile skipping, and parts timed apart."""

from __future__ import annotations

from typing import Any

from machine_rates import peaks_by_dtype

from page.markdown import LABELS, described, markdown_table, milliseconds


def attention_section(document: dict[str, Any]) -> list[str]:
    """Ratios, memory, import time and overhead of one run of attention_ratio.py."""
    lines = [f"## Attention on {document['device']['name']}", "", *described(document)]
    for name, reason in document.get("left_out", {}).items():
        lines += [f"Left out: {LABELS[name]} ({reason}).", ""]
    lines += machine_peaks(document)
    tables: dict[tuple[str, bool, int], list[dict[str, Any]]] = {}
    for result in document["timings"]:
        table = (result["pass"], result.get("causal", True), result.get("batch", 1))
        tables.setdefault(table, []).append(result)
    for (direction, causal, batch), results in tables.items():
        lines += [f"### {direction.capitalize()}, {'causal' if causal else 'over all keys'}, B = {batch}", ""]
        lines += ratio_table(results, "of register peak" if "register_gflops" in document else "of matrix product")
    if document["memory"]:
        first = document["memory"][0]
        lines += [
            f"### Peak memory of a forward pass, {first['dtype']}, H = {first['heads']}, D = {first['head_dim']}, "
            f"N = {first['length']:,}",
            "",
        ]
        lines += markdown_table(
            ["implementation", "extra, MiB", "beyond the output, MiB"],
            [
                [LABELS[found["implementation"]], f"failed: {found['error']}", ""]
                if found["error"]
                else [
                    LABELS[found["implementation"]],
                    f"{found['extra_bytes'] / 2**20:.1f}",
                    f"{found['beyond_output_bytes'] / 2**20:.1f}",
                ]
                for found in document["memory"]
            ],
        )
    imports = document["import_seconds"]
    lines += [
        "### Import and call overhead",
        "",
        f"`import sightline` takes {imports['sightline_after_torch']:.3f} s on top of torch, which takes "
        f"{imports['torch']:.2f} s (median of {imports['runs']} processes).",
        "",
    ]
    overhead = document["call_overhead"]
    modes = list(dict.fromkeys(found["mode"] for found in overhead))
    medians = {(found["implementation"], found["mode"]): found["microseconds"]["median"] for found in overhead}
    lines += markdown_table(
        ["microseconds per call, one query and one key", *modes],
        [
            [LABELS[name], *(f"{medians[name, mode]:.1f}" for mode in modes)]
            for name in dict.fromkeys(name for name, _ in medians)
        ],
    )
    return lines


def machine_peaks(document: dict[str, Any]) -> list[str]:
    """What shares of peak refer to, in words."""
    if "register_gflops" in document:
        rates = ", ".join(
            f"{rate:,.0f} GFLOP/s of {operands}" for operands, rate in document["register_gflops"].items() if rate
        )
        return [f"All threads together multiply in registers, before anything else was measured: {rates}.", ""]
    return ["The registers were not measured: shares of peak refer to the best of a large matrix product of torch.", ""]


def ratio_table(results: list[dict[str, Any]], peak: str) -> list[str]:
    """Results of one pass and pattern; with a column of ratios to zentorch where that ran in one of the cases."""
    beside_zentorch = any("ratio_to_zentorch" in result for result in results)
    rows = []
    for result in results:
        case = f"{result['dtype']}, H = {result['heads']}, D = {result['head_dim']}, N = {result['length']:,}"
        row = [case, LABELS[result["implementation"]]]
        if result["error"]:
            row += [f"failed: {result['error']}", *[""] * (3 + beside_zentorch)]
        else:
            row += [milliseconds(result["seconds"], result["repetitions"]), f"{result['ratio_to_sdpa']:.2f}"]
            if beside_zentorch:
                row.append(f"{result['ratio_to_zentorch']:.2f}" if "ratio_to_zentorch" in result else "")
            row += [f"{result['gflops']:,.0f}", f"{result['share_of_peak']:.0%}"]
        rows.append(row)
    ratios = ["x SDPA", "x zentorch"] if beside_zentorch else ["x SDPA"]
    return markdown_table(["case", "implementation", "ms (p10 - p90)", *ratios, "GFLOP/s", peak], rows, 2)


def decoding_section(document: dict[str, Any]) -> list[str]:
    """One run of decoding_ratio.py."""
    lines = [f"## Decoding on {document['device']['name']}", "", *described(document)]
    if "read_gigabytes_per_second" in document:
        bandwidth = f"a sum of torch, which reads {document['read_gigabytes_per_second']:,.1f} GB/s"
    else:
        bandwidth = "a read of the same caches by as many threads, taken in turns with the implementations"
    lines += [
        "One query row to all keys, B = 1. Rates count keys and values once; shares of bandwidth refer to "
        f"{bandwidth}.",
        "",
    ]
    rows = []
    for result in document["timings"]:
        heads = f"H = {result['heads']} on {result['key_heads']}"
        case = f"{result['dtype']}, {heads}, D = {result['head_dim']}, N = {result['length']:,}"
        label = LABELS[result["implementation"]]
        if result["error"]:
            rows.append([case, label, f"failed: {result['error']}", "", "", "", ""])
            continue
        rows.append(
            [
                case,
                label,
                milliseconds(result["seconds"]),
                f"{result['ratio_to_sdpa']:.2f}",
                f"{result['gigabytes_per_second']:,.1f}",
                f"{result['read_gigabytes_per_second']:,.1f}" if "read_gigabytes_per_second" in result else "",
                f"{result['share_of_bandwidth']:.0%}",
            ]
        )
    header = ["case", "implementation", "ms (p10 - p90)", "x SDPA", "GB/s", "read alone, GB/s", "of bandwidth"]
    return lines + markdown_table(header, rows, 2)


def skipping_section(document: dict[str, Any]) -> list[str]:
    """One run of skipping_ratio.py."""
    lines = [f"## Tile skipping on {document['device']['name']}", "", *described(document)]
    lines += [
        f"LSSAR with p = {document['power']:g}: the share of visible 64 x 64 tiles in which no row has a weight that "
        "counts, and its rate as a share of LSSA's on the same keys. Recorded keys are not causal, the others are.",
        "",
    ]
    rows = []
    for found in document["timings"]:
        shape = f"H = {found['heads']}, D = {found['head_dim']}, N = {found['length']:,}"
        times = (milliseconds(found["seconds"][name]) for name in ("lssa", "lssar"))
        share, ratio = f"{found['skippable_share']:.0%}", f"{found['lssar_to_lssa']:.2f}"
        rows.append([found["keys"], f"{found['dtype']}, {shape}", share, *times, ratio])
    header = ["keys", "case", "tiles skipped", "LSSA, ms", "LSSAR, ms", "LSSAR / LSSA rate"]
    return lines + markdown_table(header, rows, 2)


# Of each measurement of attention_options.py: its title, and what its ratio is taken to.
OPTION_TABLES = {
    "options": ("Masks, ALiBi and grouped queries, D = {head_dim}, N = {length:,}", "x the plain call's rate"),
    "widths": ("Other widths, N = {length:,}", "x the rate at D = {head_dim}"),
    "window": ("A window of {window} keys, D = {head_dim}", "x the rate at the shorter length"),
    "threads": ("Threads, D = {head_dim}, N = {length:,}", "x one thread"),
    "avx2_by_switch": ("Held to AVX2, torch by ATEN_CPU_CAPABILITY alone, N = {length:,}", "x SDPA"),
    "avx2": ("Held to AVX2, torch's MKL and oneDNN too, N = {length:,}", "x SDPA"),
}


def options_section(document: dict[str, Any]) -> list[str]:
    """One run of attention_options.py."""
    lines = [f"## Options of attention on {document['device']['name']}", "", *described(document)]
    for measurement, (title, ratio) in OPTION_TABLES.items():
        results = [result for result in document["timings"] if result["measurement"] == measurement]
        if not results:
            continue
        rows = []
        for result in results:
            row = [option_case(result), LABELS.get(result["variant"], result["variant"])]
            if result["error"]:
                row += [f"failed: {result['error']}", "", "", ""]
            else:
                relative = "" if result["relative_rate"] is None else f"{result['relative_rate']:.2f}"
                share = f"{result['share_of_peak']:.0%}" if "share_of_peak" in result else ""
                spread = milliseconds(result["seconds"], result.get("repetitions"))
                row += [spread, f"{result['gflops']:,.0f}", relative, share]
            rows.append(row)
        header = ["case", "variant", "ms (p10 - p90)", "GFLOP/s", ratio.format(**results[0]), "of register peak"]
        lines += [f"### {title.format(**results[0])}, causal", "", *markdown_table(header, rows, 2)]
    return lines


def option_case(result: dict[str, Any]) -> str:
    """What a row of a table of options is about, beyond the table's title."""
    case = f"{result['dtype']}, {LABELS[result['weighting']]}, H = {result['heads']}"
    if result["measurement"].startswith("avx2"):
        case += f", D = {result['head_dim']}"
    return f"{case}, {result.get('pass', 'forward')}"


def tile_unit_table(times: list[dict[str, float]]) -> list[str]:
    """What four products of the tile unit add to vector work of different lengths."""
    if not times:
        return []
    rows = [
        [f"{time['alone']:,.0f}", f"{time['after_products']:,.0f}", f"{time['after_products'] - time['alone']:,.0f}"]
        for time in times
    ]
    return [
        "Vector work between products of the tile unit, nanoseconds on one thread: multiply-adds alone, and each time "
        "after four products of 16 x 16 x 32. If both units worked at the same time the difference would vanish; it "
        "grows with the work, and jumps where the tile unit has fallen asleep.",
        "",
        *markdown_table(["multiply-adds alone", "after four products", "difference"], rows, 0),
    ]


def parts_section(document: dict[str, Any]) -> list[str]:
    """One run of attention_parts.py."""
    lines = [f"## Parts of attention on {document['device']['name']}", "", *described(document)]
    rates = "; ".join(
        f"{threads} thread{'s' if int(threads) > 1 else ''}: "
        + ", ".join(f"{rate:,.0f} GFLOP/s of {operands}" for operands, rate in found.items() if rate)
        for threads, found in document["multiply_gflops"].items()
    )
    lines += [
        f"What the machine multiplies in registers, {rates}. "
        f"Memory is read with {document['read_gigabytes_per_second']:.1f} GB/s.",
        "",
        *tile_unit_table(document.get("vector_nanoseconds", [])),
        "Nanoseconds per (row, key) pair on one thread, all keys visible; in brackets the share of the time, and for "
        "the two products the share of what one thread multiplies in registers.",
        "",
    ]
    rows = []
    for found in document["timings"]:
        times = found["nanoseconds"]
        total = sum(times.values())
        most = peaks_by_dtype(document["multiply_gflops"]["1"])[found["dtype"]]
        row = [f"{found['dtype']}, {LABELS[found['weighting']]}, D = {found['head_dim']}, N = {found['length']:,}"]
        for part, time in times.items():
            shares = f"{time / total:.0%}"
            if part in ("scores", "values"):
                shares += f", {2 * found['head_dim'] / time / most:.0%} of peak"
            row.append(f"{time:.3f} ({shares})")
        rows.append([*row, f"{4 * found['head_dim'] / total:,.0f}"])
    header = ["case", "packing", "scores", "weights", "weights times V", "GFLOP/s"]
    return lines + markdown_table(header, rows, 1)
