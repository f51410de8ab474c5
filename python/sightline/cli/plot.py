"""The picture of a benchmark run: throughput and memory over context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sightline.cli.stack import ROW_LABELS

# Colour, marker, marker size. The colours are Okabe and Ito's, distinct for colour-blind readers; the baselines are
# black and grey. The sizes fall so that rows which coincide, as memory does, all stay visible.
_STYLES = {
    "eager": ("#9a9a9a", "s", 5),
    "sdpa": ("#000000", "o", 9),
    "softmax": ("#0072b2", "^", 8),
    "lssa": ("#e69f00", "D", 5),
    "lssar": ("#009e73", "v", 4),
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw the measured rows of a benchmark document as a PNG: tokens per second (median, p10 to p90) and peak memory,
    and where there is decoding its tokens per second apart.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    decoded = [result for result in document["results"] if "decode" in result]
    figure = Figure(figsize=(16 if decoded else 11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory, *more = figure.subplots(1, 3 if decoded else 2)
    for row, (color, marker, size) in _STYLES.items():
        measured = [result for result in document["results"] if result["row"] == row and result["status"] == "measured"]
        style = {"color": color, "marker": marker, "markersize": size, "linewidth": 1.6}
        parts = [(speed, measured, [result["tokens_per_second"] for result in measured])]
        for axes in more:
            kept = [result for result in decoded if result["row"] == row]
            parts.append((axes, kept, [result["decode"]["tokens_per_second"] for result in kept]))
        for axes, shown, rates in parts:
            if not shown:
                continue
            axes.errorbar(
                [result["tokens"] for result in shown],
                [rate["median"] for rate in rates],
                yerr=[
                    [rate["median"] - rate["p10"] for rate in rates],
                    [rate["p90"] - rate["median"] for rate in rates],
                ],
                capsize=2.5,
                label=ROW_LABELS[row],
                **style,
            )
        sized = [result for result in document["results"] if result["row"] == row and result["peak_extra_bytes"]]
        if sized:
            memory.plot(
                [result["tokens"] for result in sized],
                [result["peak_extra_bytes"] / 2**20 for result in sized],
                label=ROW_LABELS[row],
                **style,
            )
    lengths = sorted({result["tokens"] for result in document["results"]})
    titles = [(speed, "prefill, tokens per second" if decoded else "tokens per second")]
    titles += [(memory, "peak extra memory, MiB"), *((axes, "decoding, tokens per second") for axes in more)]
    for axes, title in titles:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        axes.set_xlabel("context length, tokens")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.25, linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if speed.get_legend_handles_labels()[0]:
        speed.legend(frameon=False, fontsize=9)
    model, device = document["model"], document["device"]
    layers = f"{model['layers']} attention layer{'s' * (model['layers'] > 1)}"
    heads = f"{model['heads']} heads on {model['kv_heads']}, D = {model['head_dim']}"
    figure.suptitle(
        f"{layers}, {heads}, {document['dtype']}, {device['name']}, {device['threads']} threads", fontsize=10
    )
    figure.savefig(path, dpi=140)
