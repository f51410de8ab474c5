"""A transformers model with sightline's softmax against the same with SDPA: prefill and decoding, as committed JSON.

    python benchmarks/transformers_ratio.py --lengths 1024,4096,16384

The model is a Llama of the shape of Llama 3.2 1B with fewer layers and random weights. Both attentions take turns in
one process, on one model. docs/performance.md is made from the results by render.py.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from command_line import positive_integers, say, write_document
from transformers import LlamaConfig, LlamaForCausalLM

import sightline as sl
from sightline.cli.measure import Spread, interleave

SCHEMA = "sightline-transformers/1"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
ROWS = ("sdpa", "softmax")
NEW_TOKENS = 8
# Work of a case is about the square of its length: so many tokens are read in all.
TOKENS_IN_ALL = 1 << 15


def with_attention(model: Any, row: str, run: Callable[[], float]) -> float:
    """Seconds of `run` with the attention of this row."""
    if row == "sdpa":
        return run()
    sl.swap_attention(model, sl.Softmax())
    try:
        return run()
    finally:
        sl.restore_attention(model)


def seconds_of_prefill(model: Any, tokens: torch.Tensor) -> float:
    """Seconds of one forward pass over the prompt."""
    start = time.perf_counter()
    model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def seconds_per_token(model: Any, cache: Any, token: torch.Tensor) -> float:
    """Seconds per token of a few that follow the cached prompt, after one that warms up."""
    kept = copy.deepcopy(cache)
    model(input_ids=token, past_key_values=kept, use_cache=True)
    start = time.perf_counter()
    for _ in range(NEW_TOKENS):
        model(input_ids=token, past_key_values=kept, use_cache=True)
    return (time.perf_counter() - start) / NEW_TOKENS


def measure(model: Any, length: int, decode_repetitions: int) -> list[dict[str, Any]]:
    """Prefill and decoding of one length."""
    tokens = torch.randint(0, SIZES["vocab_size"], (1, length))
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    parts = {
        "prefill": (partial(seconds_of_prefill, model, tokens), min(11, max(2, TOKENS_IN_ALL // length))),
        "decoding": (partial(seconds_per_token, model, cache, tokens[:, :1]), decode_repetitions),
    }
    found = []
    for part, (call, repetitions) in parts.items():
        say(f"{part}, N = {length:,}")
        runs = {row: partial(with_attention, model, row, call) for row in ROWS}
        samples: dict[str, list[float]] = {row: [] for row in ROWS}
        for _, row, sample in interleave(runs, dict.fromkeys(runs, repetitions)):
            if isinstance(sample, Exception):
                raise sample
            samples[row].append(sample)
        spreads = {row: Spread.of(seconds) for row, seconds in samples.items()}
        for row, spread in spreads.items():
            ratio = spreads["sdpa"].median / spread.median
            case = {"part": part, "length": length, "implementation": row, "repetitions": repetitions}
            found.append(case | {"seconds": asdict(spread), "ratio_to_sdpa": ratio})
    return found


def main() -> None:
    """Measure every length and write one JSON file into benchmarks/results."""
    parser = argparse.ArgumentParser(description="Measure a whole transformers model and write JSON.")
    parser.add_argument("--lengths", type=positive_integers, default=[1024, 4096, 16384], metavar="N,N,...")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=15, help="of decoding; prefill by length, 2 to 11")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": options.layers, "max_position_embeddings": max(options.lengths) + 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, options.dtype)).eval()
    with torch.inference_mode():
        timings = [row for length in options.lengths for row in measure(model, length, options.repetitions)]
    write_document(SCHEMA, {"dtype": options.dtype, "sizes": sizes, "timings": timings})


if __name__ == "__main__":
    main()
