"""Ragged sizes, widths, grouped heads, memory layouts and numbers that are not finite, forward and backward."""

from __future__ import annotations

import itertools
import math
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

import sightline as sl

assert_triton_is_close = partial(assert_results_are_close, backend="triton", outputs=True)

main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
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
        # Of a handful of rows, re-weighting may be worse by max f / m (MATH.md, section 5).
        if WEIGHTINGS[weighting].reweight is None or size[0] > 60
    ],
)
def test_every_weighting_at_small_ragged_sizes(size: tuple[int, int], weighting: str, dtype: str) -> None:
    queries, keys = size
    # Enough rows for the largest error not to be a matter of luck.
    sizes = Sizes(max(1, 4 // queries), 2, 1, queries, keys, 24, 20)
    causal = bool(torch.rand(()) < 0.5)
    assert_triton_is_close(random_problem(sizes, DTYPES[dtype], causal=causal), WEIGHTINGS[weighting])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "weighting", "dtype"),
    list(
        zip(
            itertools.cycle(LARGE),
            ("softmax", "lssa", "lssar", "ssmax"),
            ("bf16", "fp32", "fp16", "fp32"),
            strict=False,
        )
    ),
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
def test_inputs_in_any_memory_give_the_same_bits(layout: str, weighting: Any) -> None:
    sizes = Sizes(2, 2, 1, 20, 70, 16, 20)
    problem = random_problem(sizes, torch.float16, causal=True, attn_mask=torch.randn(sizes.scores()))
    rearrange = LAYOUTS[layout]
    options = {**problem.options, "attn_mask": rearrange(problem.options["attn_mask"])}
    elsewhere = Problem(*(rearrange(tensor) for tensor in (problem.query, problem.key, problem.value)), options)
    grad_output, grad_log_normalizer = random_gradients(problem)
    expected = run(problem, weighting, "triton", grad_output, grad_log_normalizer)
    actual = run(elsewhere, weighting, "triton", rearrange(grad_output), grad_log_normalizer)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@every_weighting
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_and_no_keys(queries: int, keys: int, weighting: Any) -> None:
    sizes = Sizes(2, 2, 1, queries, keys, 16, 16)
    problem = random_problem(sizes, torch.float32, attn_mask=torch.zeros(sizes.scores()), scale=torch.ones(2))
    results = run(problem, weighting, "triton", *random_gradients(problem))
    assert (results["output"] == 0).all()
    assert (results["log_normalizer"] == -torch.inf).all()
    for name in ("query", "key", "value", "attn_mask", "scale"):
        assert (results[name] == 0).all(), name


def test_no_keys_leaves_the_sink_as_the_log_normalizer() -> None:
    sinks = torch.tensor([1.0, -2.0])
    result = run(random_problem(Sizes(2, 2, 1, 3, 0, 16, 16), torch.float32, sinks=sinks), sl.Softmax(), "triton")
    assert torch.equal(result["log_normalizer"], sinks.view(1, 2, 1).expand(2, 2, 3))
    assert (result["output"] == 0).all()


@every_dtype
def test_output_is_a_view_in_which_merging_the_heads_is_free(dtype: torch.dtype) -> None:
    output = run(random_problem(Sizes(2, 2, 1, 20, 20, 16, 16), dtype), sl.LSSA(), "triton")["output"]
    assert output.transpose(1, 2).is_contiguous()


@every_dtype
@every_weighting
def test_value_of_one_gives_exactly_one(weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(Sizes(1, 2, 1, 40, 70, 16, 16), dtype, causal=True)
    problem.value.fill_(1.0)
    output = run(problem, weighting, "triton")["output"]
    if dtype == torch.float32:
        torch.testing.assert_close(output, torch.ones_like(output), rtol=0, atol=1e-6)
    else:
        assert (output == 1).all()


@every_dtype
def test_softplus_of_very_negative_scores_keeps_its_small_weights(dtype: torch.dtype) -> None:
    weighting = sl.Softplus(length_scale=False, normalize_qk=False)
    mask = torch.full((40, 70), -60.0)
    assert_triton_is_close(random_problem(Sizes(1, 1, 1, 40, 70, 16, 16), dtype, attn_mask=mask), weighting)


@every_dtype
@main_weightings
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_what_is_not_finite_reaches_only_rows_that_give_it_weight(
    of: str, poison: float, weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(Sizes(1, 2, 1, 70, 70, 16, 16), dtype, causal=True)
    clean_gradients = random_gradients(problem)
    clean = run(problem, weighting, "triton", *clean_gradients)
    getattr(problem, of)[0, 0, 50, 3] = poison
    results = run(problem, weighting, "triton", *clean_gradients)
    blind_rows = slice(0, 50)
    if of == "query":
        others = [row for row in range(70) if row != 50]
        torch.testing.assert_close(results["output"][:, :, others], clean["output"][:, :, others])
        torch.testing.assert_close(results["query"][:, :, others], clean["query"][:, :, others])
        # Keys after row 50 are not seen by it.
        torch.testing.assert_close(results["key"][:, :, 51:], clean["key"][:, :, 51:])
        assert not results["output"][0, 0, 50].isfinite().all()
        return
    torch.testing.assert_close(results["output"][:, :, blind_rows], clean["output"][:, :, blind_rows])
    torch.testing.assert_close(results["query"][:, :, blind_rows], clean["query"][:, :, blind_rows])
    assert not results["output"][:, :, 50:].isfinite().all()


@pytest.mark.parametrize("weighting", ["softmax", "lssa"])
def test_an_infinite_value_arrives_as_infinity(weighting: str) -> None:
    problem = random_problem(Sizes(1, 1, 1, 40, 40, 16, 16), torch.float32, causal=True)
    problem.value[0, 0, 10, 2] = math.inf
    problem.value[0, 0, 20, 2] = -math.inf
    output = run(problem, WEIGHTINGS[weighting], "triton")["output"][0, 0]
    assert output[:10].isfinite().all()
    assert (output[10:20, 2] == math.inf).all()
    assert output[20:, 2].isnan().all()
    assert output[:, :2].isfinite().all()
