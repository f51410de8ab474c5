"""Tile skipping of re-weighting on the CPU: tiles whose weights do not count are left out of the second sweep."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, WEIGHTINGS, Problem, clustered_problem, run
from attention_checks import assert_outputs_are_close, assert_results_are_close

import sightline as sl

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.mark.isa
@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_stay_close(causal: bool, dtype: torch.dtype) -> None:
    problem = clustered_problem(dtype, queries=200, causal=causal)
    assert_outputs_are_close(problem, sl.LSSAR(), lambda problem: run(problem, sl.LSSAR(), "native"))


@every_dtype
@pytest.mark.parametrize("name", ["lssar", "lssar3", "lssar2.5", "lssar1", "sharp_softmax", "offset_softmax"])
def test_outputs_and_gradients_of_every_power_stay_close(name: str, dtype: torch.dtype) -> None:
    assert_results_are_close(clustered_problem(dtype, causal=True), WEIGHTINGS[name], "native", outputs=True)


# Without an offset every key that a row sees has a weight, however small.
EVERY_KEY_WEIGHS = sl.Softplus(reweight=sl.Reweight(15.0, offset=0.0))


def looking_away_from_nan(dtype: torch.dtype) -> tuple[Problem, torch.Tensor]:
    """32 rows along one direction; keys along it, and from 320 on at a right angle to it, where one value is NaN.

    With it the output without the NaN.
    """
    directions = torch.eye(16)[[0] * 320 + [1] * 320] + 0.02 * torch.randn(1, 2, 640, 16)
    query = torch.eye(16)[0] + 0.02 * torch.randn(1, 4, 32, 16)
    problem = Problem(query.to(dtype), directions.to(dtype), torch.randn(1, 2, 640, 16).to(dtype), {})
    clean = run(problem, EVERY_KEY_WEIGHS, "native")["output"]
    problem.value[:, :, 400] = math.nan
    return problem, clean


@pytest.mark.isa
@every_dtype
def test_tiles_that_do_not_count_are_left_out(dtype: torch.dtype) -> None:
    problem, clean = looking_away_from_nan(dtype)
    weight = sl.attention_rows(problem.query, problem.key, torch.arange(32), weighting=EVERY_KEY_WEIGHS)[..., 400]
    assert weight.min() > 0
    assert weight.max() < 2.0**-24
    assert torch.equal(run(problem, EVERY_KEY_WEIGHS, "native")["output"], clean)


def test_one_row_for_which_a_tile_counts_makes_it_count() -> None:
    problem, _ = looking_away_from_nan(torch.float32)
    problem.query[:, :, 7] = problem.key[:, :, 400].repeat_interleave(2, 1)
    assert run(problem, EVERY_KEY_WEIGHS, "native")["output"].isnan().all()


@every_dtype
def test_a_nan_in_a_key_of_a_tile_that_would_be_left_out_reaches_every_row(dtype: torch.dtype) -> None:
    problem, _ = looking_away_from_nan(dtype)
    problem.value.nan_to_num_()
    problem.key[:, :, 400, 3] = math.nan
    assert run(problem, EVERY_KEY_WEIGHS, "native")["output"].isnan().all()


TAU = {torch.float32: 2.0**-24, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-12}


def one_against_many(dtype: torch.dtype, count: int, weight: float) -> Problem:
    """A first key of value 0 and many of value 1, whose softmax weights are `weight` times that of the first."""
    query, key, value = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, count, 16), torch.ones(1, 1, count, 16)
    query[..., 0] = 1.0
    key[:, :, 1:, 0] = math.log(weight)
    value[:, :, 0] = 0.0
    return Problem(query.to(dtype), key.to(dtype), value.to(dtype), {"scale": 1.0})


@every_dtype
def test_keys_that_hold_little_each_and_much_together_count(dtype: torch.dtype) -> None:
    """A quarter of tau each: the bound is a share of tau for all keys together."""
    weighting = sl.Softmax(reweight=sl.Reweight(2.0, offset=0.0))
    problem = one_against_many(dtype, 2**14, math.sqrt(TAU[dtype] / 4))
    expected = run(problem.to(torch.float64), weighting, "reference")["output"]
    assert expected.min() > 100 * TAU[dtype]
    torch.testing.assert_close(run(problem, weighting, "native")["output"].double(), expected, rtol=2e-2, atol=0)


def test_keys_whose_responses_alone_count_have_their_part_in_the_gradient() -> None:
    """Gradients weigh a key by a power less than outputs do: 2^-19 above the mean, squared, is less than tau / n."""
    count, offset, excess = 4096, 0.5, 2.0**-19
    weighting = sl.Softmax(reweight=sl.Reweight(2.0, offset=offset, exempt_rows=0))
    weight = (excess + offset / count) / (1 - offset * (count - 1) / count)  # mean + excess
    problem = one_against_many(torch.float32, count, weight)
    gradient = torch.ones(1, 1, 32, 16)
    expected = run(problem.to(torch.float64), weighting, "reference", gradient)["key"][:, :, 1:, 0]
    actual = run(problem, weighting, "native", gradient)["key"][:, :, 1:, 0].double()
    assert (actual - expected).norm() < 1e-2 * expected.norm()
