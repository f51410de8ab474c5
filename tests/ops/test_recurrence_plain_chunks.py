"""Chunks of keys without mask and gain, which the tile unit weighs and transposes at once, beside any other chunk."""

from __future__ import annotations

import math

import pytest
import torch
from recurrence_cases import Sizes, assert_results_are_close, random_gradients, random_problem
from tolerance import assert_equal_but_for_rounding

import sightline as sl

LENGTHS = [15, 16, 17, 63, 64, 65, 95, 203]


def problem_of(length, ramp=0.0, width=64):
    return random_problem(Sizes(length=length, width=width, value_width=48), torch.bfloat16, ramp=ramp, causal=False)


def by_either_way(problem):
    """The outputs without a mask, and with one that hides nothing: its chunks are weighed row by row."""
    inputs = problem.query, problem.key, problem.value
    everything = torch.ones(problem.key.shape[0], problem.key.shape[2], dtype=torch.bool)
    return (
        sl.additive_recurrence(*inputs, causal=False)[0],
        sl.additive_recurrence(*inputs, causal=False, key_mask=everything)[0],
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [16, 24, 128])
def test_both_ways_give_the_same(length, width):
    assert_equal_but_for_rounding(*by_either_way(problem_of(length, width=width)))


@pytest.mark.parametrize("length", LENGTHS)
def test_as_close_to_the_formula_as_any(length):
    problem = problem_of(length)
    assert_results_are_close(problem, backend="native", gradients={"output": random_gradients(problem)["output"]})


@pytest.mark.parametrize("step", [-5.0, 0.3, 7.0])
def test_keys_that_leave_the_reach_of_the_shift_and_stay_within_it_again(step):
    # Climbing or falling for the first half, and level for the second, in every third channel.
    rows = torch.arange(200).clamp(max=100)[:, None] * step
    problem = problem_of(200, ramp=torch.where(torch.arange(64) % 3 == 0, rows, torch.zeros(())))
    assert_equal_but_for_rounding(*by_either_way(problem))
    assert_results_are_close(problem, backend="native", gradients={"output": random_gradients(problem)["output"]})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["key", "value"])
def test_numbers_that_are_not_finite(tensor, number):
    problem = problem_of(203)
    getattr(problem, tensor)[0, 1, 130, 5] = number
    actual, expected = by_either_way(problem)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    plain = expected.isfinite()
    assert_equal_but_for_rounding(actual[plain], expected[plain])


def test_a_channel_without_any_key():
    problem = problem_of(130)
    problem.key[..., 7] = -math.inf
    problem.key[:, :, :70, 9] = -math.inf
    assert_equal_but_for_rounding(*by_either_way(problem))
    assert_results_are_close(problem, backend="native", gradients={"output": random_gradients(problem)["output"]})
