"""A boolean mask that heads share is packed once for all of them: the same bits as from a copy for every head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import PAIRS, Sizes, random_inputs

import sightline as sl

TILE = 64
SHAPES = {
    "a head of keys each": Sizes(batch=2, heads=3, key_heads=3, queries=150, keys=203),
    "whole tiles of a group": Sizes(batch=2, heads=4, key_heads=2, queries=128, keys=190),
    "more queries than keys": Sizes(batch=2, heads=2, key_heads=2, queries=300, keys=65),
}
OPTIONS = ["all keys", "causal", "window", "window both ways", "lengths", "key mask", "documents"]


def blocky_mask(batch: int, sizes: Sizes) -> torch.Tensor:
    """(batch, 1, M, N): tiles that hide everything, a half, few entries or nothing."""
    rows, keys = -(-sizes.queries // TILE), -(-sizes.keys // TILE)
    share = torch.tensor([0.0, 0.5, 0.99, 1.0])[torch.randint(4, (batch, 1, rows, keys))]
    share = share.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)[..., : sizes.queries, : sizes.keys]
    return torch.rand(share.shape) < share


def options_of(name: str, sizes: Sizes) -> dict[str, Any]:
    if name == "documents":
        cut, key_cut = sizes.queries // 3, sizes.keys // 2
        return {
            "cu_seqlens_q": torch.tensor([0, cut, cut, sizes.queries], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, key_cut, key_cut + 3, sizes.keys], dtype=torch.int32),
            "causal": True,
        }
    return {
        "all keys": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (70, 0)},
        "window both ways": {"window": (5, 90)},
        "lengths": {"causal": True, "key_lengths": torch.tensor([17, sizes.keys])},
        "key mask": {"key_mask": torch.rand(sizes.batch, sizes.keys) < 0.8},
    }[name]


@pytest.mark.isa
@pytest.mark.parametrize("shared_by_batch", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
def test_a_shared_mask_gives_the_bits_of_a_mask_per_head(
    weighting: Any, dtype: torch.dtype, sizes: Sizes, option: str, shared_by_batch: bool
) -> None:
    batch = 1 if option == "documents" else sizes.batch
    inputs = [tensor[:batch].detach().requires_grad_() for tensor in random_inputs(sizes, dtype)]
    shared = blocky_mask(1 if shared_by_batch else batch, sizes)
    own = shared.expand(batch, sizes.heads, -1, -1).contiguous()
    options = options_of(option, sizes)
    results = []
    for mask in (shared, own):
        output, statistics = sl.attention(
            *inputs,
            weighting=weighting,
            attn_mask=mask,
            observe=sl.Observe(log_normalizer=True),
            backend="native",
            **options,
        )
        gradient = torch.cos(torch.arange(float(output.numel()))).reshape(output.shape).to(dtype)
        results.append([output, statistics.log_normalizer, *torch.autograd.grad(output, inputs, gradient)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


REPEATED_ROW_SCRIPT = """
from pathlib import Path
import torch
import sightline as sl

def memory(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) * 1024

length = 32768
query, key, value = (torch.randn(1, 2, length, 8) for _ in range(3))
row = torch.zeros(1, 1, 1, length, dtype=torch.bool)
row[..., [3, 20_000, length - 1]] = True
mask = row.expand(1, 1, length, length)
sl.attention(query[:, :, :300], key, value, attn_mask=mask[:, :, :300])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
output = sl.attention(query, key, value, attn_mask=mask)
print(memory("VmHWM") - before - output.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_mask_that_repeats_itself_is_not_unpacked() -> None:
    """One row for 32,768 queries takes 32 KiB as it is, and would take 200 MB in tiles."""
    child = subprocess.run([sys.executable, "-c", REPEATED_ROW_SCRIPT], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 64 * 2**20
