"""`sl.attention` beside torch SDPA under pytest-benchmark: `pytest benchmarks/bench_attention.py`.

A group holds the implementations of one pass, dtype and shape, so that its table is a comparison. Ratios measured in
turns come from attention_ratio.py. Peers that are not installed are skipped.
"""

from __future__ import annotations

import pytest
import torch
from attention_peers import (
    IMPLEMENTATIONS,
    backward_pass,
    forward_pass,
    forward_peers,
    random_inputs,
    training_pass,
)

SHAPES = {"1K": (8, 1024, 64), "4K": (8, 4096, 64), "4K wide heads": (4, 4096, 128)}
DTYPES = (torch.float32, torch.bfloat16)
PASSES = {"forward": forward_pass, "backward": backward_pass, "forward+backward": training_pass}
PEERS, MISSING = forward_peers(causal=True)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, *PEERS, *MISSING])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("direction", list(PASSES))
def test_attention(benchmark, direction, shape, dtype, name):
    if name in MISSING:
        pytest.skip(f"{name}: {MISSING[name]}")
    if name in PEERS and direction != "forward":
        pytest.skip(f"{name}: forward only")
    heads, length, width = SHAPES[shape]
    inputs = random_inputs(heads, length, width, dtype, torch.device("cpu"))
    benchmark.group = f"{direction}, H = {heads}, N = {length}, D = {width}, {dtype}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    run = PASSES[direction]((IMPLEMENTATIONS | PEERS)[name], inputs)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
