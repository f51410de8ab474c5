"""Which tiles are computed: those above the diagonal, outside of a window or past a cache are not even loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Sizes, random_problem, run
from attention_checks import random_gradients

import sightline as sl
from sightline.ops.backends import INTERPRETS_TRITON
from sightline.triton import backward, forward, mask_gradient, sweeps
from sightline.triton.tiles import choose_tile

pytestmark = pytest.mark.skipif(not INTERPRETS_TRITON, reason="only the interpreter runs tiles as Python")

SIZES = Sizes(batch=1, heads=1, key_heads=1, queries=200, keys=330, width=16, value_width=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (70, 0)},
    "lengths": {"causal": True, "key_lengths": torch.tensor([150])},
}


def seen_tiles(options: dict[str, Any]) -> int:
    """Pairs of a tile of rows and a tile of keys with a visible entry."""
    tile = choose_tile("forward", None)
    length = int(options.get("key_lengths", torch.tensor([SIZES.keys])))
    row, key = torch.arange(SIZES.queries)[:, None] + length - SIZES.queries, torch.arange(SIZES.keys)[None]
    visible = (key < length) & ((key <= row) | (not options.get("causal", False)))
    visible &= key >= row - options["window"][0] if "window" in options else True
    padded = torch.nn.functional.pad(visible, (0, -SIZES.keys % tile.keys, 0, -SIZES.queries % tile.rows))
    return int(padded.unflatten(1, (-1, tile.keys)).unflatten(0, (-1, tile.rows)).any(3).any(1).sum())


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[int]]:
    """Count the calls of a device function of a module."""

    def counting(module: Any, name: str) -> list[int]:
        calls: list[int] = []
        function = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            calls.append(1)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
        return calls

    return counting


@pytest.mark.parametrize("name", OPTIONS)
def test_no_tile_without_a_visible_entry_is_computed(name: str, count: Callable[[Any, str], list[int]]) -> None:
    options = OPTIONS[name]
    mask = torch.zeros(1, 1, 1, SIZES.keys)
    problem = random_problem(SIZES, torch.float32, **options)
    counted = {
        "forward": count(sweeps, "load_value_tile"),
        "queries": count(backward, "load_value_tile"),
        "keys": count(backward, "finish_scores"),
    }
    run(problem, sl.Softmax(), "triton", *random_gradients(problem))
    expected = seen_tiles(options)
    assert {kernel: len(calls) for kernel, calls in counted.items()} == dict.fromkeys(counted, expected)
    calls = count(mask_gradient, "differentiate")
    masked = random_problem(SIZES, torch.float32, **options, attn_mask=mask)
    run(masked, sl.Softmax(), "triton", *random_gradients(masked))
    assert len(calls) == expected


@pytest.mark.parametrize(
    ("module", "beginning", "working_module", "working"),
    [
        (forward, "visible_range", sweeps, "load_value_tile"),
        (backward, "visible_range", backward, "load_value_tile"),
        (backward, "query_range", backward, "finish_scores"),
    ],
    ids=["forward", "queries", "keys"],
)
def test_under_causality_the_longest_programs_start_first(
    module: Any, beginning: str, working_module: Any, working: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that short ones fill the gaps at the end; the interpreter starts programs in the order of a GPU."""
    programs: list[int] = []
    begin, work = getattr(module, beginning), getattr(working_module, working)

    def begun(*arguments: Any) -> Any:
        programs.append(0)
        return begin(*arguments)

    def worked(*arguments: Any) -> Any:
        programs[-1] += 1
        return work(*arguments)

    problem = random_problem(replace(SIZES, heads=2), torch.float32, causal=True)
    inputs = random_gradients(problem)
    monkeypatch.setattr(module, beginning, begun)
    monkeypatch.setattr(working_module, working, worked)
    run(problem, sl.Softmax(), "triton", *inputs)
    assert len(set(programs)) > 2
    assert programs == sorted(programs, reverse=True)


def test_the_diagonal_leaves_out_tiles() -> None:
    assert seen_tiles(OPTIONS["window"]) < seen_tiles(OPTIONS["causal"]) < seen_tiles(OPTIONS["everything"]) == 7 * 6
