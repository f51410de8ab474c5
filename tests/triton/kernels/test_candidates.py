"""Every tile that tuning may choose is right: tuning looks at the time alone, so this must be known beforehand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, MAIN_WEIGHTINGS, WEIGHTINGS, Sizes, random_problem, run
from attention_checks import assert_outputs_are_close, assert_results_are_close
from triton_cases import variant_of

from sightline.ops.backends import INTERPRETS_TRITON
from sightline.triton import tuning
from sightline.triton.problem import Variant
from sightline.triton.tiles import CANDIDATES, Tile, candidates, choose_tile

# The interpreter has no time for all; there a tile is its rows and keys alone, and the largest fits in twice each way.
SIZES = [Sizes(1, 2, 1, 150, 140, 16, 16)] if INTERPRETS_TRITON else []
SIZES += [] if INTERPRETS_TRITON else [Sizes(1, 4, 2, 700, 1100, width, width) for width in (64, 128)]


def most_candidates(weighting: str, dtype: str, width: int) -> int:
    """How many candidates the kernel with the most of them has."""
    variants = [
        variant_of(WEIGHTINGS[weighting], width=width, dtype=DTYPES[dtype], saves=saves) for saves in (False, True)
    ]
    return max(len(candidates(*of)) for of in itertools.product(("forward", "queries", "keys"), variants))


ENTRIES = [
    pytest.param(place, weighting, dtype, sizes, id=f"{place}-{weighting}-{dtype}-{sizes.width}")
    for (turn, weighting), dtype, sizes in itertools.product(enumerate(MAIN_WEIGHTINGS), DTYPES, SIZES)
    for place in range(most_candidates(weighting, dtype, sizes.width))
    if not INTERPRETS_TRITON or dtype == "fp32" or (dtype == "fp16") == ((place + turn) % 2 == 0)
]


@pytest.mark.parametrize(("place", "weighting", "dtype", "sizes"), ENTRIES)
def test_every_tile_that_tuning_may_choose_is_right(
    place: int, weighting: str, dtype: str, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Tile] = []

    def tile_for(kernel: str, variant: Variant, *_: Any) -> Tile:
        others = candidates(kernel, variant)[place : place + 1]
        tried.extend(others)
        return others[0] if others else choose_tile(kernel, variant)

    monkeypatch.setattr(tuning, "tile_for", tile_for)
    problem = random_problem(sizes, DTYPES[dtype], causal=True)
    chosen = WEIGHTINGS[weighting]
    # Without gradients and with them: re-weighting has a forward of its own for each.
    assert_outputs_are_close(problem, chosen, lambda problem: run(problem, chosen, "triton"))
    assert_results_are_close(problem, chosen, "triton", outputs=True)
    assert tried


def test_loads_by_pointers_and_forwards_without_gradients_are_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, bool, Tile]] = set()

    def tile_for(kernel: str, variant: Variant, *_: Any) -> Tile:
        seen.update((kernel, variant.saves, tile) for tile in candidates(kernel, variant))
        return choose_tile(kernel, variant)

    monkeypatch.setattr(tuning, "tile_for", tile_for)
    problem = random_problem(SIZES[0], torch.bfloat16, causal=True)
    run(problem, WEIGHTINGS["lssar"], "triton")
    inference = {tile for kernel, _, tile in seen if kernel == "forward"}
    assert inference <= set(CANDIDATES["sharp forward", "half"])
    assert any(not tile.descriptors for tile in inference)
    assert_results_are_close(problem, WEIGHTINGS["lssar"], "triton")
    assert {kernel for kernel, _, _ in seen} == {"forward", "queries", "keys"}
    assert {saves for kernel, saves, _ in seen if kernel == "forward"} == {False, True}
