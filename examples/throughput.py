"""Tokens per second against the context, from 1K to 1M tokens: the recurrence, LSSA, softmax and torch's SDPA.

Causal forward, one batch entry. A kernel that passes --limit seconds at one length, or would by the growth of its last
two, is not run at longer ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import environment, finish_line, parser, progress, run, write
from torch.nn import functional

import sightline as sl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kernels() -> dict[str, Callable[..., torch.Tensor]]:
    """What is measured, each a function of query, key and value."""
    return {
        "LightNet": sl.additive_recurrence,
        "LSSA": lambda query, key, value: sl.attention(query, key, value, weighting=sl.LSSA(), causal=True),
        "softmax": lambda query, key, value: sl.attention(query, key, value, causal=True),
        "torch SDPA": lambda query, key, value: functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        ),
    }


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the committed results."""
    arguments = parser(__doc__.splitlines()[0], steps=3)
    arguments.add_argument("--limit", type=float, default=5.0, help="seconds of one call")
    arguments.add_argument("--longest", type=int, default=2**20, help="tokens")
    arguments.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    arguments.add_argument("--heads", type=int, default=8)
    arguments.add_argument("--width", type=int, default=128)
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = arguments_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    measured: dict[str, dict[int, list[float]]] = {name: {} for name in kernels()}
    length, running = 1024, kernels()
    while length <= arguments.longest and running:
        shape = (1, arguments.heads, length, arguments.width)
        inputs = [torch.randn(shape, dtype=DTYPES[arguments.dtype]) for _ in range(3)]
        for name, kernel in list(running.items()):
            progress(f"{name} at {length} tokens")
            kernel(*(tensor[:, :, :256] for tensor in inputs))
            seconds = []
            while len(seconds) < arguments.steps and sum(seconds) < arguments.limit:
                began = time.perf_counter()
                kernel(*inputs)
                seconds.append(time.perf_counter() - began)
            before = measured[name].get(length // 2)
            measured[name][length] = seconds
            finish_line(f"{name}: {length / min(seconds):,.0f} tokens/s at {length} tokens")
            growth = min(seconds) / min(before) if before else 2.0
            if min(seconds) * max(growth, 2.0) > arguments.limit:
                del running[name]
        length *= 2

    def draw(axes: Any) -> None:
        for name, values in measured.items():
            axes.plot(list(values), [count / min(seconds) for count, seconds in values.items()], marker="o", label=name)
        axes.set(xlabel="context in tokens", ylabel="tokens per second", xscale="log", yscale="log")
        axes.legend()

    write(arguments.output, "throughput", {**environment(arguments), "seconds": measured}, draw)


if __name__ == "__main__":
    run(main)
