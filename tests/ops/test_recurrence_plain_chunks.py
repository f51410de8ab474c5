"""Chunks of keys without mask and gain, weighed and transposed at once for products of pairs, beside any other chunk.

Only outputs alone are gathered so: with the final state weights are not rounded to bfloat16.
"""

from __future__ import annotations

import math

import pytest
import torch
from recurrence_cases import Problem, Sizes, outputs, random_problem, random_state
from tolerance import Comparison, assert_close_to_reference

import sightline as sl

# The first chunk starts without a shift and is no plain one: from 80 on the rest, of 16 rows and more, may be.
LENGTHS = [15, 64, 65, 79, 80, 81, 95, 96, 97, 111, 127, 128, 129, 203]


def problem_of(length, *, ramp=0.0, width=64, value_width=48, **options):
    sizes = Sizes(length=length, width=width, value_width=value_width)
    return random_problem(sizes, torch.bfloat16, ramp=ramp, causal=False, **options)


def output(problem, **options):
    return sl.additive_recurrence(problem.query, problem.key, problem.value, **problem.options, **options)


def row_by_row(problem):
    """The output beside a mask that hides nothing: weighed as any other chunk."""
    return output(problem, key_mask=torch.ones(problem.key.shape[0], problem.key.shape[2], dtype=torch.bool))


def assert_output_is_close(problem):
    def compare(problem: Problem) -> Comparison:
        exact = output(problem.in_float64(), backend="reference")
        return Comparison(output(problem), exact, output(problem, backend="reference"))

    assert_close_to_reference(compare(problem), redraw=lambda turn: compare(problem.redrawn(turn)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [16, 24, 128])
def test_no_bit_depends_on_the_way(length, width):
    problem = problem_of(length, width=width)
    assert torch.equal(output(problem), row_by_row(problem))


@pytest.mark.parametrize("length", LENGTHS)
def test_as_close_to_the_formula_as_any(length):
    assert_output_is_close(problem_of(length))


@pytest.mark.parametrize("value_width", [1, 16, 32, 40, 64, 80, 96, 112, 130])
@pytest.mark.parametrize("length", [17, 129])
def test_every_number_of_vectors_of_values(length, value_width):
    """Dot products take four vectors at a time, and what is left with other numbers of rows."""
    problem = problem_of(length, value_width=value_width)
    assert torch.equal(output(problem), row_by_row(problem))
    assert_output_is_close(problem)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_keeps_more_digits_than_the_dtype_has(dtype, causal):
    """Weights of bfloat16 would move it by 1e-3, and what a later call goes on from with it."""
    problem = random_problem(Sizes(length=300), dtype, causal=causal)
    found, exact = outputs(problem, "native"), outputs(problem.in_float64(), "reference")
    for name in ("log_normalizer", "memory"):
        assert (found[name].double() - exact[name]).norm() < 5e-5 * exact[name].norm(), name


@pytest.mark.parametrize("length", [16, 17, 63, 64, 100])
def test_after_a_state_the_first_chunk_is_plain_too(length):
    sizes = Sizes(length=length, width=64, value_width=48)
    state = random_state(sizes, sizes.batch)
    problem = problem_of(length, initial_state=sl.RecurrenceState(state.log_normalizer + 2, state.memory))
    assert torch.equal(output(problem), row_by_row(problem))
    assert_output_is_close(problem)


@pytest.mark.parametrize("step", [-5.0, 0.3, 7.0])
def test_keys_that_leave_the_reach_of_the_shift_and_stay_within_it_again(step):
    # Climbing or falling for the first half, and level for the second, in every third channel.
    rows = torch.arange(200).clamp(max=100)[:, None] * step
    problem = problem_of(200, ramp=torch.where(torch.arange(64) % 3 == 0, rows, torch.zeros(())))
    assert torch.equal(output(problem), row_by_row(problem))
    assert_output_is_close(problem)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["key", "value"])
def test_numbers_that_are_not_finite(tensor, number):
    problem = problem_of(203)
    getattr(problem, tensor)[0, 1, 130, 5] = number
    torch.testing.assert_close(output(problem), row_by_row(problem), rtol=0, atol=0, equal_nan=True)


def test_a_channel_without_any_key():
    problem = problem_of(130)
    problem.key[..., 7] = -math.inf
    problem.key[:, :, :70, 9] = -math.inf
    assert torch.equal(output(problem), row_by_row(problem))
    assert_output_is_close(problem)


@pytest.mark.parametrize("number", [0.5, math.inf])
def test_blocks_of_values_do_not_change_a_bit_though_one_has_an_infinite_value(number):
    # Each of two threads has half of the columns, and weighs all keys.
    sizes = Sizes(1, 1, 1, 700, 512, 128)
    problem = random_problem(sizes, torch.bfloat16, causal=False)
    problem.key *= 4
    problem.value[0, 0, 100, 0] = number
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = output(problem)
        torch.set_num_threads(2)
        actual = output(problem)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
