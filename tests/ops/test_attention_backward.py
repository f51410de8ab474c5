from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    DIFFERENTIABLE,
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
from attention_checks import assert_results_are_close, random_gradients

import sightline as sl

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
every_pair = pytest.mark.parametrize(("weighting", "dtype"), PAIRS.values(), ids=PAIRS.keys())
option_pairs = pytest.mark.parametrize(("weighting", "dtype"), OPTION_PAIRS.values(), ids=OPTION_PAIRS.keys())
main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())


assert_gradients_are_close = partial(assert_results_are_close, backend="native")


@every_pair
@pytest.mark.parametrize(("queries", "keys"), RAGGED_SIZES)
def test_every_weighting_at_ragged_sizes(queries: int, keys: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = ragged_sizes(queries, keys)
    for causal in (False, True) if queries < 500 else (True,):
        assert_gradients_are_close(random_problem(sizes, dtype, causal=causal), weighting)


@main_weightings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_are_gathered_at_once(weighting: Any, dtype: torch.dtype) -> None:
    """What keys and values receive is gathered over 2,048 rows of a key head, and then added to the totals."""
    sizes = Sizes(batch=1, heads=4, key_heads=1, queries=600, keys=70, width=16, value_width=16)
    assert_gradients_are_close(random_problem(sizes, dtype), weighting)


@option_pairs
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes()
    assert_gradients_are_close(random_problem(sizes, dtype, **OPTIONS[option](sizes)), weighting)


@every_dtype
@pytest.mark.parametrize("weighting", ["softmax", "ssmax", "capped", "cosine"])
@pytest.mark.parametrize("option", SOFTMAX_OPTIONS)
def test_sinks(option: str, weighting: str, dtype: torch.dtype) -> None:
    sizes = Sizes()
    assert_gradients_are_close(random_problem(sizes, dtype, **SOFTMAX_OPTIONS[option](sizes)), WEIGHTINGS[weighting])


@every_pair
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents(packing: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(batch=1, queries=140, keys=170)
    assert_gradients_are_close(random_problem(sizes, dtype, **PACKINGS[packing](sizes)), weighting)


@pytest.mark.isa
@by_turn("width", [2, 7, 16, 31, 64, 100, 128, 256, 512])
def test_every_width(width: int, weighting: Any, dtype: torch.dtype) -> None:
    for value_width in {width, 1, 48}:
        sizes = Sizes(batch=1, queries=20, keys=90, width=width, value_width=value_width)
        assert_gradients_are_close(random_problem(sizes, dtype, causal=True), weighting)


@every_dtype
@pytest.mark.parametrize("value_width", [1, 16])
def test_width_of_one(value_width: int, dtype: torch.dtype) -> None:
    sizes = Sizes(width=1, value_width=value_width)
    for weighting in ("softmax", "ssmax", "raw_softplus"):
        assert_gradients_are_close(random_problem(sizes, dtype, causal=True), WEIGHTINGS[weighting])
    for weighting in ("cosine", "lssa", "lssar"):
        problem = random_problem(sizes, dtype, causal=True, scale=0.7)
        gradients = run(problem, WEIGHTINGS[weighting], "native", *random_gradients(problem))
        # Normalised they are signs, and a sign has no gradient: what is left is rounding, divided by the norm.
        for name in ("query", "key"):
            assert (gradients[name] * getattr(problem, name)).abs().max() < 1e-4, name


@by_turn(("heads", "key_heads"), [(1, 1), (3, 1), (6, 2), (5, 5), (16, 1)])
def test_grouped_heads_add_up_in_their_key_head(heads: int, key_heads: int, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(heads=heads, key_heads=key_heads, queries=30, keys=70)
    assert_gradients_are_close(random_problem(sizes, dtype, causal=True), weighting)


@by_turn("full_axes", ["", "n", "m", "h", "b", "mn", "hn", "bn", "hm", "bm", "bh", "hmn", "bmn", "bhn", "bhm", "bhmn"])
def test_every_shape_of_a_float_mask(full_axes: str, weighting: Any, dtype: torch.dtype) -> None:
    sizes = Sizes(queries=33)
    shape = [size if axis in full_axes else 1 for axis, size in zip("bhmn", sizes.scores(), strict=True)]
    mask = torch.randn(shape)
    if "n" in full_axes:
        mask = mask.masked_fill(torch.rand(shape) < 0.2, -torch.inf)
    mask_dtype = dtype if len(full_axes) % 2 else torch.float32
    assert_gradients_are_close(random_problem(sizes, dtype, attn_mask=mask.to(mask_dtype), causal=True), weighting)


@pytest.mark.parametrize("shape", [(4, 1, 130), (70, 130), (130,), ()])
def test_a_mask_with_fewer_axes_gets_a_gradient_of_its_own_shape(shape: tuple[int, ...]) -> None:
    gradients = assert_gradients_are_close(
        random_problem(Sizes(), torch.float32, attn_mask=torch.randn(shape)), sl.LSSA()
    )
    assert gradients["attn_mask"].shape == shape


@every_pair
@pytest.mark.parametrize("of", ["output", "log_normalizer"])
def test_gradients_of_one_output_alone(of: str, weighting: Any, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"attn_mask": torch.randn(70, 130), "scale": 0.5 + torch.rand(4), "causal": True}
    if isinstance(weighting, sl.Softmax) and weighting.reweight is None:
        options["sinks"] = torch.randn(4)
    problem = random_problem(Sizes(), dtype, **options)
    grad_output, grad_log_normalizer = random_gradients(problem)
    pair = (grad_output, None) if of == "output" else (None, grad_log_normalizer)
    gradients = assert_gradients_are_close(problem, weighting, gradients=pair)
    if of == "log_normalizer":
        assert (gradients["value"] == 0).all()


@by_turn("layout", LAYOUTS)
def test_inputs_in_any_memory_give_the_same_bits(layout: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(Sizes(), dtype, causal=True, attn_mask=torch.randn(2, 4, 70, 130))
    rearrange = LAYOUTS[layout]
    options = {**problem.options, "attn_mask": rearrange(problem.options["attn_mask"])}
    elsewhere = Problem(*(rearrange(tensor) for tensor in (problem.query, problem.key, problem.value)), options)
    grad_output, grad_log_normalizer = random_gradients(problem)
    expected = run(problem, weighting, "native", grad_output, grad_log_normalizer)
    actual = run(elsewhere, weighting, "native", rearrange(grad_output), grad_log_normalizer)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@main_weightings
def test_expanded_gradients_of_a_sum(weighting: Any) -> None:
    problem = random_problem(Sizes(), torch.float32)
    ones = torch.ones(2, 4, 70, 20)
    expected = run(problem, weighting, "native", ones)
    actual = run(problem, weighting, "native", torch.ones(()).expand(2, 4, 70, 20))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@every_pair
def test_one_row_against_a_cache(weighting: Any, dtype: torch.dtype) -> None:
    for key_heads in (1, 8):
        # So many entries because the few large weights of a row decide over its largest error.
        sizes = Sizes(batch=8, heads=8, key_heads=key_heads, queries=1, keys=300)
        problem = random_problem(sizes, dtype, causal=True, key_lengths=torch.tensor([300, 171] * 4))
        gradients = assert_gradients_are_close(problem, weighting)
        assert (gradients["key"][1::2, :, 171:] == 0).all()
        assert (gradients["value"][1::2, :, 171:] == 0).all()


@every_weighting
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_and_no_keys_give_zero_gradients(queries: int, keys: int, weighting: Any) -> None:
    sizes = Sizes(queries=queries, keys=keys)
    problem = random_problem(sizes, torch.float32, attn_mask=torch.zeros(sizes.scores()), scale=torch.ones(4))
    gradients = run(problem, weighting, "native", *random_gradients(problem))
    for name in ("query", "key", "value", "attn_mask", "scale"):
        leaf = problem.options[name] if name in DIFFERENTIABLE else getattr(problem, name)
        assert gradients[name].shape == leaf.shape
        assert (gradients[name] == 0).all(), name


@every_pair
def test_rows_that_see_nothing_have_no_gradient(weighting: Any, dtype: torch.dtype) -> None:
    mask = torch.rand(70, 130) < 0.5
    mask[::3] = False
    problem = random_problem(Sizes(), dtype, attn_mask=torch.zeros(70, 130).masked_fill(~mask, -torch.inf))
    gradients = assert_gradients_are_close(problem, weighting)
    assert (gradients["query"][:, :, ::3] == 0).all()
    assert (gradients["attn_mask"][~mask] == 0).all()


@every_dtype
@pytest.mark.parametrize("weighting", ["cosine", "lssa", "lssar"])
def test_a_vector_whose_norm_is_at_its_floor_gets_no_gradient(weighting: str, dtype: torch.dtype) -> None:
    problem = random_problem(Sizes(), dtype)
    problem.query[:, :, 5] *= 1e-9
    problem.query[:, :, 6] = 0
    problem.key[:, :, 7] = 0
    problem.key[:, :, 8] *= 1e-12
    gradients = run(problem, WEIGHTINGS[weighting], "native", *random_gradients(problem))
    assert gradients["query"].isfinite().all()
    assert (gradients["query"][:, :, 5:7] == 0).all()
    assert (gradients["key"][:, :, 7:9] == 0).all()
    if dtype != torch.float16:  # in which the reference itself overflows at 1 / floor
        assert_gradients_are_close(problem, WEIGHTINGS[weighting])


@every_dtype
@pytest.mark.parametrize("weighting", ["softmax", "ssmax", "lssa", "raw_softplus"])
def test_a_row_of_one_key_has_no_gradient_of_query_and_key(weighting: str, dtype: torch.dtype) -> None:
    sizes = Sizes(queries=90, keys=90)
    problem = random_problem(sizes, dtype, window=(0, 0))
    gradients = run(problem, WEIGHTINGS[weighting], "native", random_gradients(problem)[0])
    # What is left of <do, v> - <do, o>, two sums of the same products in different orders.
    assert gradients["query"].abs().max() < 1e-5
    assert gradients["key"].abs().max() < 1e-5
