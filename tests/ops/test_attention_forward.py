from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    LAYOUTS,
    MAIN_WEIGHTINGS,
    OPTION_PAIRS,
    OPTIONS,
    PACKINGS,
    PAIRS,
    RAGGED_SIZES,
    SOFTMAX_OPTIONS,
    WEIGHTINGS,
    Problem,
    Sizes,
    by_turn,
    ragged_sizes,
    random_problem,
    run,
)
from attention_checks import assert_outputs_are_close

import sightline as sl
from sightline import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
every_pair = pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
option_pairs = pytest.mark.parametrize(("weighting", "dtype"), OPTION_PAIRS.values(), ids=OPTION_PAIRS.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())


def assert_forward_is_close(problem: Problem, weighting: Any) -> dict[str, torch.Tensor]:
    native = assert_outputs_are_close(problem, weighting, lambda problem: run(problem, weighting, "native"))
    assert native["output"].dtype == problem.query.dtype
    assert native["log_normalizer"].dtype == torch.float32
    return native


@pytest.mark.isa
def test_kernels_are_those_of_the_instruction_set_asked_for() -> None:
    assert ops.isa_name() == os.environ.get("SIGHTLINE_ISA", ops.available_isas()[-1])


@every_pair
@pytest.mark.parametrize(("queries", "keys"), RAGGED_SIZES)
def test_every_weighting_at_ragged_sizes(queries: int, keys: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = ragged_sizes(queries, keys)
    for causal in (False, True) if queries < 500 else (True,):
        assert_forward_is_close(random_problem(sizes, dtype, causal=causal), weighting)


@option_pairs
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes()
    assert_forward_is_close(random_problem(sizes, dtype, **OPTIONS[option](sizes)), weighting)


@every_dtype
@pytest.mark.parametrize("weighting", ["softmax", "ssmax", "capped", "cosine"])
@pytest.mark.parametrize("option", SOFTMAX_OPTIONS)
def test_sinks(option: str, weighting: str, dtype: torch.dtype) -> None:
    sizes = Sizes()
    assert_forward_is_close(random_problem(sizes, dtype, **SOFTMAX_OPTIONS[option](sizes)), WEIGHTINGS[weighting])


@every_pair
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents(packing: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(batch=1, queries=140, keys=170)
    assert_forward_is_close(random_problem(sizes, dtype, **PACKINGS[packing](sizes)), weighting)


@pytest.mark.isa
@by_turn("width", [1, 2, 7, 16, 31, 64, 100, 128, 256, 512])
def test_every_width(width: int, weighting: Any, dtype: torch.dtype) -> None:
    for value_width in {width, 1, 48}:
        sizes = Sizes(batch=1, queries=20, keys=90, width=width, value_width=value_width)
        problem = random_problem(sizes, dtype, causal=True, scale=0.7 if width == 1 else None)
        assert_forward_is_close(problem, weighting)


@by_turn(("heads", "key_heads"), [(1, 1), (3, 1), (6, 2), (5, 5), (16, 1)])
def test_grouped_heads(heads: int, key_heads: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(heads=heads, key_heads=key_heads, queries=30, keys=70)
    assert_forward_is_close(random_problem(sizes, dtype, causal=True), weighting)


# An instruction set loads a mask along the keys or repeats one number, which two shapes show; the others are strides.
MASKS = [
    pytest.param(kind, shape, marks=[pytest.mark.isa] if shape in ("full", "query") else [])
    for kind in ("bool", "float", "same")
    for shape in ("full", "batch", "head", "query", "key", "rows", "one", "three_axes", "two_axes")
]


@by_turn(("kind", "shape"), MASKS)
def test_every_shape_of_attn_mask(kind: str, shape: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(queries=20)
    b, h, m, n = sizes.scores()
    shapes = {
        "full": (b, h, m, n),
        "batch": (b, 1, 1, 1),
        "head": (1, h, 1, 1),
        "query": (1, 1, m, 1),
        "key": (1, 1, 1, n),
        "rows": (1, h, m, 1),
        "one": (1, 1, 1, 1),
        "three_axes": (h, 1, n),
        "two_axes": (m, n),
    }
    mask = torch.rand(shapes[shape]) < 0.7
    if kind != "bool":
        mask = torch.randn(shapes[shape]).masked_fill(~mask, -torch.inf).to(torch.float32 if kind == "float" else dtype)
    assert_forward_is_close(random_problem(sizes, dtype, attn_mask=mask), weighting)


@by_turn("layout", LAYOUTS)
def test_inputs_in_any_memory_give_the_same_bits(layout: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(Sizes(), dtype, causal=True, attn_mask=torch.randn(2, 4, 70, 130))
    rearrange = LAYOUTS[layout]
    elsewhere = Problem(
        *(rearrange(tensor) for tensor in (problem.query, problem.key, problem.value)), dict(problem.options)
    )
    elsewhere.options["attn_mask"] = rearrange(problem.options["attn_mask"])
    assert elsewhere.query.data_ptr() % 8 or not elsewhere.query.is_contiguous()
    expected, actual = run(problem, weighting, "native"), run(elsewhere, weighting, "native")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@main_weightings
def test_heads_that_share_memory_by_expansion(weighting: Any) -> None:
    query, key, value = torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 16)
    one = sl.attention(query, key, value, weighting=weighting, backend="native")
    many = sl.attention(
        query.expand(2, 4, -1, -1),
        key.expand(2, 4, -1, -1),
        value.expand(2, 2, -1, -1).repeat(1, 2, 1, 1),
        weighting=weighting,
        backend="native",
    )
    assert torch.equal(many, one.expand(2, 4, -1, -1))


@every_pair
def test_one_row_against_a_cache(weighting: Any, dtype: torch.dtype) -> None:
    for key_heads in (1, 2, 8):
        sizes = Sizes(heads=8, key_heads=key_heads, queries=1, keys=300)
        lengths = torch.tensor([300, 171])
        whole = assert_forward_is_close(random_problem(sizes, dtype, causal=True), weighting)
        assert whole["output"].shape == (2, 8, 1, 20)
        assert_forward_is_close(random_problem(sizes, dtype, causal=True, key_lengths=lengths), weighting)


@every_pair
def test_query_block_at_the_end_of_a_cache_equals_the_last_rows_of_the_whole(
    weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(Sizes(queries=200, keys=200), dtype, causal=True, window=(150, None))
    block = replace(problem, query=problem.query[:, :, -37:])
    whole, part = run(problem, weighting, "native"), assert_forward_is_close(block, weighting)
    for name in whole:
        torch.testing.assert_close(part[name], whole[name][:, :, -37:])


@every_weighting
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_and_no_keys(queries: int, keys: int, weighting: Any) -> None:
    problem = random_problem(Sizes(queries=queries, keys=keys), torch.float32, causal=True)
    result = run(problem, weighting, "native")
    assert result["output"].shape == (2, 4, queries, 20)
    assert (result["output"] == 0).all()
    assert (result["log_normalizer"] == -torch.inf).all()


def test_no_keys_leaves_the_sink_as_the_log_normalizer() -> None:
    problem = random_problem(Sizes(queries=3, keys=0), torch.float32, sinks=torch.tensor([1.0, -2.0, 0.0, 3.0]))
    result = run(problem, sl.Softmax(), "native")
    assert torch.equal(result["log_normalizer"], problem.options["sinks"].view(1, 4, 1).expand(2, 4, 3))
    assert (result["output"] == 0).all()


@every_weighting
def test_an_empty_batch(weighting: Any) -> None:
    result = run(random_problem(Sizes(batch=0), torch.float32), weighting, "native")
    assert result["output"].shape == (0, 4, 70, 20)
    assert result["log_normalizer"].shape == (0, 4, 70)


@every_pair
def test_rows_that_see_nothing_are_zero(weighting: Any, dtype: torch.dtype) -> None:
    mask = torch.rand(70, 130) < 0.5
    mask[::3] = False
    result = assert_forward_is_close(random_problem(Sizes(), dtype, attn_mask=mask), weighting)
    assert (result["output"][:, :, ::3] == 0).all()
    assert (result["log_normalizer"][:, :, ::3] == -torch.inf).all()


@main_weightings
def test_key_lengths_outside_the_tensor_are_cut_off(weighting: Any) -> None:
    problem = random_problem(Sizes(), torch.float32, key_lengths=torch.tensor([1000, -4]))
    clamped = replace(problem, options={"key_lengths": torch.tensor([130, 0])})
    expected, actual = run(clamped, weighting, "native"), run(problem, weighting, "native")
    assert torch.equal(actual["output"], expected["output"])


@every_dtype
def test_output_is_a_view_in_which_merging_the_heads_is_free(dtype: torch.dtype) -> None:
    output = run(random_problem(Sizes(), dtype), sl.LSSA(), "native")["output"]
    assert output.transpose(1, 2).is_contiguous()
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()
