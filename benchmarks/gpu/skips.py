"""How many key tiles re-weighting leaves out, and what that gains: `python -m gpu.skips`.

On random keys, on keys in clusters, and on those of a trained sentence model in recorded_keys.pt, which record_keys.py
wrote: a dictionary of `query` (B, H, N, D) and `key` (B, Hk, N, D), one layer per batch entry. SIGHTLINE_RECORDED_KEYS
names another file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import sightline as sl
from gpu.measure import seconds_per_call
from gpu.steps import record
from sightline.triton import launch
from sightline.triton.skipping import count_tiles

RECORDED_VARIABLE = "SIGHTLINE_RECORDED_KEYS"
RECORDED = Path(__file__).parent / "recorded_keys.pt"
RECORDED_NAME = "recorded keys"
CLUSTERS, STRETCH = 32, 256  # directions, and keys in a row that share one
SPREAD = 0.3
_NEVER = 2**31

Timer = Callable[[Callable[[], object], int, bool], float]


def random_keys(length: int, heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Independent normal queries and keys (1, H, N, D)."""
    shape = (1, heads, length, width)
    return torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device).bfloat16()


def clustered_keys(length: int, heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stretches of keys near one of a few directions, and queries that each look for one: the shape of a document."""
    centres = torch.nn.functional.normalize(torch.randn(heads, CLUSTERS, width, device=device), dim=-1)
    stretches = -(-length // STRETCH)
    topics = torch.randint(CLUSTERS, (stretches,), device=device).repeat_interleave(STRETCH)[:length]
    wanted = torch.randint(CLUSTERS, (stretches,), device=device).repeat_interleave(STRETCH)[:length]
    noise = SPREAD / width**0.5

    def near(chosen: Tensor) -> Tensor:
        return (centres[:, chosen] + noise * torch.randn(heads, length, width, device=device))[None].bfloat16()

    return near(wanted), near(topics)


def measure_skips(
    name: str,
    query: Tensor,
    key: Tensor,
    causal: bool = True,
    timer: Timer = seconds_per_call,
    backend: str = "triton",
    least_tiles: int | None = None,
) -> None:
    """Record the share of tiles left out of the second sweep, and the time with and without leaving any out.

    `least_tiles`: from how many tiles of a row on any are left out, where that is not to be the library's own number.
    """
    call = partial(sl.attention, query, key, key, weighting=sl.LSSAR(), causal=causal, backend=backend)
    own = launch.LEAST_SKIPPING_TILES
    least = own if least_tiles is None else least_tiles
    times: dict[str, list[float]] = {}
    try:
        with torch.inference_mode():
            launch.LEAST_SKIPPING_TILES = least
            with count_tiles() as counts:
                call()
            share = counts.skipped_share if counts.calls else None
            for label, tiles in (("skipping", least), ("whole", _NEVER)) * 2:
                launch.LEAST_SKIPPING_TILES = tiles
                timer(call, 1, False)
                times.setdefault(label, []).append(timer(call, 5, False))
    finally:
        launch.LEAST_SKIPPING_TILES = own
    seconds = {label: min(found) for label, found in times.items()}
    gain = seconds["whole"] / seconds["skipping"]
    record({"kind": "skips", "name": name, "skipped_share": share, "seconds": seconds, "gain": gain})


def main() -> None:
    """Measure recorded keys, which tell most, then drawn ones at two lengths."""
    device = torch.device("cuda")
    path = os.environ.get(RECORDED_VARIABLE) or RECORDED
    recorded = torch.load(path, map_location=device, weights_only=True)
    query, key = recorded["query"].bfloat16(), recorded["key"].bfloat16()
    name = f"{RECORDED_NAME}, D = {query.shape[3]}, N = {key.shape[2]:,}"
    # The model reads both ways and 512 tokens at most, which are few tiles.
    measure_skips(name, query, key, causal=False, least_tiles=1)
    for length in (16384, 65536):
        for kind in (random_keys, clustered_keys):
            name = f"{kind.__name__.removesuffix('_keys')} keys, D = 128, N = {length:,}"
            measure_skips(name, *kind(length, 8, 128, device))


if __name__ == "__main__":
    main()
