"""Ragged sizes, widths, grouped heads and memory layouts, forward and backward."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    RAGGED_SIZES,
    WEIGHTINGS,
    Problem,
    Sizes,
    random_problem,
    run,
)
from attention_checks import assert_results_are_close, random_gradients

from sightline.ops.backends import INTERPRETS_TRITON

assert_triton_is_close = partial(assert_results_are_close, backend="triton", outputs=True)

main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

# Some entries carry marks, which here are not wanted.
SHAPES: list[tuple[int, int]] = [tuple(getattr(size, "values", size)) for size in RAGGED_SIZES]
SMALL = [size for size in SHAPES if max(size) < 100]
LARGE = [size for size in SHAPES if max(size) >= 100]


@pytest.mark.parametrize(
    ("size", "weighting", "dtype"),
    [
        (size, weighting, list(DTYPES)[(place + turn) % 3])
        for (place, size), (turn, weighting) in itertools.product(enumerate(SMALL), enumerate(WEIGHTINGS))
        # Every weighting at every other size, the interpreter being slow.
        if (place + turn) % 2 == 0
    ],
)
def test_every_weighting_at_small_ragged_sizes(size: tuple[int, int], weighting: str, dtype: str) -> None:
    queries, keys = size
    # Enough rows for the errors not to be a matter of luck: in 16 bits a nearly one-hot row of re-weighting loses much
    # of its gradient to the rounding of the output, and takes many others to make up for it.
    rows = 48 if "lssar" in weighting and dtype != "fp32" else 12
    sizes = Sizes(max(1, rows // queries), 2, 1, queries, keys, 24, 20)
    causal = bool(torch.rand(()) < 0.5)
    assert_triton_is_close(random_problem(sizes, DTYPES[dtype], causal=causal), WEIGHTINGS[weighting])


@pytest.mark.parametrize(
    ("size", "weighting", "dtype"),
    [
        (size, weighting, list(DTYPES)[(place + turn) % 3])
        for (place, size), (turn, weighting) in itertools.product(enumerate(LARGE), enumerate(MAIN_WEIGHTINGS))
    ],
)
def test_large_ragged_sizes(size: tuple[int, int], weighting: str, dtype: str) -> None:
    queries, keys = size
    sizes = Sizes(1, 1, 1, queries, keys, 16, 16)
    assert_triton_is_close(random_problem(sizes, DTYPES[dtype], causal=True), WEIGHTINGS[weighting])


@main_weightings
@pytest.mark.parametrize(("width", "value_width"), [(2, 1), (7, 33), (64, 64), (100, 48), (128, 16), (256, 256)])
def test_every_width(width: int, value_width: int, weighting: Any) -> None:
    sizes = Sizes(1, 2, 1, 20, 90, width, value_width)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[(width + value_width) % 3]
    assert_triton_is_close(random_problem(sizes, dtype, causal=True), weighting)


@main_weightings
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 1), (6, 2), (5, 5)])
def test_grouped_heads(heads: int, key_heads: int, weighting: Any) -> None:
    sizes = Sizes(1, heads, key_heads, 30, 70, 16, 16)
    assert_triton_is_close(random_problem(sizes, torch.float32, causal=True), weighting)


@every_dtype
@main_weightings
def test_one_row_against_a_cache(weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 8, 2, 1, 300, 16, 16)
    lengths = torch.tensor([300, 171])
    results = assert_triton_is_close(random_problem(sizes, dtype, causal=True, key_lengths=lengths), weighting)
    assert (results["key"][1, :, 171:] == 0).all()
    assert (results["value"][1, :, 171:] == 0).all()


@main_weightings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_memory_give_the_same_results(layout: str, weighting: Any) -> None:
    """In the interpreter the same bits; a compiler lays tiles out by how loads are aligned, and so orders sums anew."""
    sizes = Sizes(2, 2, 1, 20, 70, 16, 20)
    problem = random_problem(sizes, torch.float16, causal=True, attn_mask=torch.randn(sizes.scores()))
    rearrange = LAYOUTS[layout]
    options = {**problem.options, "attn_mask": rearrange(problem.options["attn_mask"])}
    elsewhere = Problem(*(rearrange(tensor) for tensor in (problem.query, problem.key, problem.value)), options)
    grad_output, grad_log_normalizer = random_gradients(problem)
    gradients = (rearrange(grad_output), grad_log_normalizer)
    if not INTERPRETS_TRITON:
        assert_triton_is_close(elsewhere, weighting, gradients=gradients)
        return
    expected = run(problem, weighting, "triton", grad_output, grad_log_normalizer)
    actual = run(elsewhere, weighting, "triton", *gradients)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
