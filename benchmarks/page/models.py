"""Whole models: stacks of attention layers, and a transformers model."""

from __future__ import annotations

from typing import Any

from page.markdown import LABELS, described, markdown_table, milliseconds


def stack_section(document: dict[str, Any]) -> list[str]:
    """One run of `sightline bench`."""
    model = document["model"]
    lines = [
        f"## Stack of {model['layers']} attention layers on {document['device']['name']}, {document['dtype']}",
        "",
        f"Width {model['width']}, {model['heads']} query heads on {model['kv_heads']} key heads, "
        f"D = {model['head_dim']}, feed-forward width {model.get('feed_forward', 0)}, weights {model['weights']}; "
        f"text: {document['text']['source']}.",
        "",
        *described(document),
    ]
    rows = []
    for result in document["results"]:
        name = f"{result['tokens']:,}", LABELS[result["row"]]
        if result["status"] != "measured":
            rows.append([*name, f"{result['status']}: {result['reason'] or 'run interrupted'}", "", "", "", ""])
            continue
        rate, peak, ratio = result["tokens_per_second"], result["peak_extra_bytes"], result["ratio_to_sdpa"]
        rows.append(
            [
                *name,
                f"{rate['median']:,.0f} ({rate['p10']:,.0f} - {rate['p90']:,.0f})",
                "" if ratio is None else f"{ratio:.2f}",
                "" if peak is None else f"{peak / 2**20:,.1f}",
                f"{result['attention_gflops']:,.0f}",
                f"{result['decode']['tokens_per_second']['median']:,.1f}" if "decode" in result else "",
            ]
        )
    header = ["tokens", "implementation", "tokens/s (p10 - p90)", "x SDPA", "peak extra memory, MiB", "GFLOP/s"]
    header.append("decoding, tokens/s")
    return lines + markdown_table(header, rows, 2)


def transformers_section(document: dict[str, Any]) -> list[str]:
    """One run of transformers_ratio.py."""
    sizes = document["sizes"]
    lines = [f"## A whole transformers model on {document['device']['name']}", "", *described(document)]
    lines += [
        f"A Llama with random weights, {document['dtype']}: width {sizes['hidden_size']}, feed-forward width "
        f"{sizes['intermediate_size']}, {sizes['num_hidden_layers']} layers, {sizes['num_attention_heads']} query "
        f"heads on {sizes['num_key_value_heads']} key heads, D = {sizes['head_dim']}. Decoding: per token, the cache "
        "is transformers' own. Ratios to the same model with SDPA.",
        "",
    ]
    rows = [
        [
            f"{found['part']}, N = {found['length']:,}",
            LABELS[found["implementation"]],
            milliseconds(found["seconds"]),
            f"{found['ratio_to_sdpa']:.2f}",
        ]
        for found in document["timings"]
    ]
    return lines + markdown_table(["case", "attention", "ms (p10 - p90)", "x SDPA"], rows, 2)
