"""Keys and values by tensor descriptors: the results of loading by pointers, and pointers where tensors do not fit.

Under the interpreter a specialised loop runs in one piece: what is seen of it here is how it keeps its sums. That
kernels load by descriptors and that loops are split shows in what tests/triton/test_compile.py compiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    OPTIONS,
    PACKINGS,
    WEIGHTINGS,
    Problem,
    Sizes,
    random_problem,
    run,
)
from attention_checks import assert_results_are_close, random_gradients

from sightline.ops.backends import INTERPRETS_TRITON
from sightline.triton import launch, tuning
from sightline.triton.compat import has_tensor_descriptors
from sightline.triton.problem import Variant
from sightline.triton.skipping import count_tiles
from sightline.triton.tiles import Tile, choose_tile

if not has_tensor_descriptors():
    pytest.skip("this device has no tensor descriptors", allow_module_level=True)

Loads = Callable[..., list[bool]]
# A head of queries for each of keys: groups are what other sizes here are about, and programs take the time.
SIZES = Sizes(batch=2, heads=2, key_heads=2, queries=40, keys=150, width=16, value_width=32)
PACKED_SIZES = Sizes(batch=1, heads=2, key_heads=1, queries=70, keys=90, width=16, value_width=16)
MASKS = [
    *("causal", "left_window", "window", "lengths", "causal_lengths", "key_mask", "left_padding", "bool_mask"),
    *("float_mask", "causal_alibi", "causal_dropout", "everything"),
]
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())


def in_turn(*axes: Any, last: Any = DTYPES) -> list[Any]:
    """The product of the axes, each entry with the next of `last`: the interpreter has no time for all."""
    turns = itertools.cycle(last)
    return [
        pytest.param(*entry, turn, id="-".join(map(str, (*entry, turn))))
        for entry, turn in zip(itertools.product(*axes), turns, strict=False)
    ]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Choose how tiles are loaded from here on; what comes back notes for every first launch how it did load."""
    start = launch._start

    def choose(descriptors: bool = True, specialized: bool = False) -> list[bool]:
        described: list[bool] = []

        def tile_for(kernel: str, variant: Variant, *_: Any) -> Tile:
            return choose_tile(kernel, variant)._replace(descriptors=descriptors, specialized=specialized)

        def noting(kernel: Any, programs: int, variant: Variant, *arguments: Any) -> None:
            described.append(variant.descriptors)
            start(kernel, programs, variant, *arguments)

        monkeypatch.setattr(tuning, "tile_for", tile_for)
        monkeypatch.setattr(launch, "_start", noting)
        return described

    return choose


def assert_close(problem: Problem, weighting: Any) -> None:
    assert_results_are_close(problem, weighting, "triton", outputs=True)


def assert_as_by_pointers(problem: Problem, weighting: Any, loads: Loads) -> None:
    """The bits of loading by pointers, which other tests compare with the reference; a compiler may order sums anew."""
    described = loads()
    if INTERPRETS_TRITON:
        gradients = random_gradients(problem)
        actual = run(problem, weighting, "triton", *gradients)
        loads(descriptors=False)
        expected = run(problem, weighting, "triton", *gradients)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    else:
        assert_close(problem, weighting)
    assert any(described)


@pytest.mark.parametrize(
    ("size", "weighting", "dtype"), in_turn([(1, 1), (3, 3), (63, 65), (70, 203)], MAIN_WEIGHTINGS)
)
def test_ragged_sizes(size: tuple[int, int], weighting: str, dtype: str, loads: Loads) -> None:
    queries, keys = size
    sizes = Sizes(max(1, 48 // queries), 2, 1, queries, keys, 16, 16)
    described = loads()
    assert_close(random_problem(sizes, DTYPES[dtype], causal=True), WEIGHTINGS[weighting])
    assert any(described)


@pytest.mark.parametrize(("width", "dtype", "weighting"), in_turn([64, 128], DTYPES, last=MAIN_WEIGHTINGS))
def test_widths_of_models(width: int, dtype: str, weighting: str, loads: Loads) -> None:
    described = loads()
    problem = random_problem(Sizes(1, 2, 1, 40, 90, width, width), DTYPES[dtype], causal=True)
    assert_close(problem, WEIGHTINGS[weighting])
    assert any(described)


@pytest.mark.parametrize(("option", "weighting", "dtype"), in_turn(MASKS, ["lssa", "lssar"]))
def test_whatever_hides_keys_hides_them(option: str, weighting: str, dtype: str, loads: Loads) -> None:
    problem = random_problem(SIZES, DTYPES[dtype], **OPTIONS[option](SIZES))
    assert_as_by_pointers(problem, WEIGHTINGS[weighting], loads)


@pytest.mark.parametrize(("packing", "weighting"), in_turn(PACKINGS, last=MAIN_WEIGHTINGS))
def test_packed_documents(packing: str, weighting: str, loads: Loads) -> None:
    problem = random_problem(PACKED_SIZES, torch.float16, **PACKINGS[packing](PACKED_SIZES))
    assert_as_by_pointers(problem, WEIGHTINGS[weighting], loads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_are_listed(dtype: torch.dtype, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LEAST_SKIPPING_TILES", 1)
    described = loads()
    with count_tiles() as counts:
        assert_close(random_problem(Sizes(1, 2, 1, 70, 330, 16, 16), dtype, causal=True), WEIGHTINGS["lssar"])
    assert counts.calls
    assert any(described)


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="a compiler may order sums by how operands come")
@pytest.mark.parametrize(("name", "dtype"), in_turn(["softmax", "capped", "lssa", "cosine", "lssar", "lssar2.5"]))
def test_the_bits_of_loading_by_pointers(name: str, dtype: str, loads: Loads) -> None:
    problem = random_problem(SIZES, DTYPES[dtype], causal=True, window=(60, 0))
    gradients = random_gradients(problem)
    results = []
    for descriptors in (False, True):
        described = loads(descriptors)
        results.append(run(problem, WEIGHTINGS[name], "triton", *gradients))
        # Forward, the gradient of the queries, and that of the keys, which streams rows.
        assert described == [descriptors] * 3
    for result in results[0]:
        assert torch.equal(results[0][result], results[1][result]), result


@main_weightings
def test_rows_of_every_head_of_a_group_are_streamed(weighting: Any, loads: Loads) -> None:
    problem = random_problem(Sizes(2, 6, 2, 70, 90, 16, 32), torch.bfloat16, causal=True, window=(50, 0))
    gradients = random_gradients(problem)
    longer = torch.full((2, 6, 128, 16), math.nan, dtype=torch.bfloat16)
    longer[:, :, :70] = problem.query
    problem.query = longer[:, :, :70]  # what lies past the last row is not read
    described = loads()
    actual = run(problem, weighting, "triton", *gradients)
    assert described == [True] * 3
    loads(descriptors=False)
    expected = run(problem, weighting, "triton", *gradients)
    for name in expected:
        if INTERPRETS_TRITON:
            assert torch.equal(actual[name], expected[name]), name
        else:
            torch.testing.assert_close(actual[name], expected[name])


@main_weightings
def test_what_lies_past_the_last_key_is_not_read(weighting: Any, loads: Loads) -> None:
    problem = random_problem(Sizes(1, 2, 2, 40, 70, 16, 16), torch.float16)
    longer = [torch.full((1, 2, 128, 16), math.nan, dtype=torch.float16) for _ in range(2)]
    for room, tensor in zip(longer, (problem.key, problem.value), strict=True):
        room[:, :, :70] = tensor
    cut = Problem(problem.query, longer[0][:, :, :70], longer[1][:, :, :70], {})
    described = loads()
    gradients = random_gradients(problem)
    expected, actual = (run(each, weighting, "triton", *gradients) for each in (problem, cut))
    assert described == [True] * 6
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize(("of", "weighting", "dtype"), in_turn(["key", "value"], MAIN_WEIGHTINGS))
def test_what_is_not_finite_reaches_only_rows_that_see_it(of: str, weighting: str, dtype: str, loads: Loads) -> None:
    problem = random_problem(Sizes(1, 2, 1, 70, 70, 16, 16), DTYPES[dtype], causal=True)
    described = loads()
    clean = run(problem, WEIGHTINGS[weighting], "triton")["output"]
    getattr(problem, of)[0, 0, 50, 3] = math.nan
    output = run(problem, WEIGHTINGS[weighting], "triton")["output"]
    assert described == [True, True]
    assert torch.equal(output[:, :, :50], clean[:, :, :50])
    assert output[:, :, 50:].isnan().any()
    loads(descriptors=False)
    # Re-weighting may give a key exactly no weight: which rows see it is what loading by pointers says.
    by_pointers = run(problem, WEIGHTINGS[weighting], "triton")["output"]
    torch.testing.assert_close(output, by_pointers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("of", ["key", "value", "query"])
@pytest.mark.parametrize("layout", ["odd_offset", "slice_of_wider_rows"])
def test_tensors_off_the_boundaries_are_loaded_by_pointers(layout: str, of: str, loads: Loads) -> None:
    problem = random_problem(SIZES, torch.float16, causal=True)
    gradients = random_gradients(problem)
    described = loads()
    expected = run(problem, WEIGHTINGS["lssa"], "triton", *gradients)
    assert described == [True] * 3
    described.clear()
    setattr(problem, of, LAYOUTS[layout](getattr(problem, of)))
    actual = run(problem, WEIGHTINGS["lssa"], "triton", *gradients)
    # The gradient of the keys streams rows, all others stream keys and values.
    assert described == ([True, True, False] if of == "query" else [False, False, True])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("width", [4, 24])
def test_widths_that_no_descriptor_takes_are_loaded_by_pointers(width: int, loads: Loads) -> None:
    described = loads()
    assert_close(random_problem(Sizes(1, 2, 1, 40, 70, width, width), torch.float16, causal=True), WEIGHTINGS["lssar"])
    assert described
    assert not any(described)


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="test_hardware.py runs the tiles that are specialised")
@pytest.mark.parametrize(
    ("option", "name", "dtype"),
    in_turn(["causal", "window"], ["softmax", "capped", "lssa", "lssar", "sharp_softmax"], last=["bf16", "fp16"]),
)
def test_specialised_loops_keep_the_same_sums(
    option: str, name: str, dtype: str, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "can_be_specialized", lambda variant: True)
    described = loads(specialized=True)
    assert_close(random_problem(SIZES, DTYPES[dtype], **OPTIONS[option](SIZES)), WEIGHTINGS[name])
    assert any(described)
