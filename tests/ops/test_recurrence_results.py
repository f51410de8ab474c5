"""Results of the additive recurrence too large for the caches, which its native kernels write past them."""

from __future__ import annotations

import pytest
import torch
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    Problem,
    Sizes,
    outputs,
    random_gradients,
    random_problem,
    random_state,
    run,
)
from tolerance import assert_equal_but_for_rounding

import sightline as sl

LEAST_BYTES = 2 * 1024 * 1024  # kStreamedBytes of csrc/cpu/tile_shapes.h

pytestmark = pytest.mark.isa


@CAUSAL
@pytest.mark.parametrize("value_width", [64, 48, 41])
@EVERY_DTYPE
def test_large_results_are_those_of_every_entry_alone(dtype, value_width, causal):
    # Values of 48 columns are whole lines in float32 alone, of 41 in no dtype.
    sizes = Sizes(batch=128, heads=4, key_heads=2, length=90, width=64, value_width=value_width)
    problem = random_problem(sizes, dtype, causal=causal)
    gradients = {"output": random_gradients(problem)["output"]}
    results = run(problem, "native", gradients)
    assert all(results[name].nbytes >= LEAST_BYTES for name in ("output", "query", "key"))
    for entry in (0, 77, 127):
        one = slice(entry, entry + 1)
        alone = Problem(problem.query[one], problem.key[one], problem.value[one], problem.options)
        expected = run(alone, "native", {"output": gradients["output"][one]})
        assert expected["output"].nbytes < LEAST_BYTES
        for name in ("output", "query", "key", "value"):
            torch.testing.assert_close(results[name][one], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("value_width", [128, 48, 41])
def test_large_states_of_one_token_are_those_of_every_entry_alone(value_width, group):
    # Of five query heads four share a pass over the state, and the fifth reads it once more.
    sizes = Sizes(batch=128, heads=2 * group, key_heads=2, length=1, width=64, value_width=value_width)
    state = random_state(sizes, sizes.batch)
    problem = random_problem(sizes, initial_state=state)
    problem.value[77, 1] = torch.nan
    results = outputs(problem, "native")
    assert results["memory"].nbytes >= LEAST_BYTES
    for entry in (0, 77, 127):
        one = slice(entry, entry + 1)
        options = {"initial_state": sl.RecurrenceState(*(part[one] for part in state))}
        alone = Problem(problem.query[one], problem.key[one], problem.value[one], options)
        expected = outputs(alone, "native")
        assert expected["memory"].nbytes < LEAST_BYTES
        for name, result in results.items():
            torch.testing.assert_close(result[one], expected[name], rtol=0, atol=0, equal_nan=True)


@CAUSAL
def test_large_results_of_one_head_do_not_depend_on_the_number_of_threads(causal):
    problem = random_problem(Sizes(1, 1, 1, 8300, 64, 64), causal=causal)
    gradients = random_gradients(problem)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(problem, "native", gradients)
        torch.set_num_threads(2)
        results = run(problem, "native", gradients)
    finally:
        torch.set_num_threads(before)
    assert results["output"].nbytes >= LEAST_BYTES
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@EVERY_DTYPE
def test_what_is_kept_of_many_rows_is_what_two_heads_would_keep(dtype):
    # Rows of one query head are kept past the caches; those of a group are added up in them.
    problem = random_problem(Sizes(1, 1, 1, 8300, 64, 64), dtype, causal=True)
    gradients = {"output": random_gradients(problem)["output"]}
    results = run(problem, "native", gradients)
    group = Problem(problem.query.repeat(1, 2, 1, 1), problem.key, problem.value, problem.options)
    without_second = {"output": torch.cat([gradients["output"], torch.zeros_like(gradients["output"])], 1)}
    expected = run(group, "native", without_second)
    assert_equal_but_for_rounding(results["query"], expected["query"][:, :1])
    for name in ("key", "value"):
        assert_equal_but_for_rounding(results[name], expected[name])


@pytest.mark.parametrize("name", ["query", "key", "value"])
@CAUSAL
def test_large_results_of_inputs_whose_heads_lie_side_by_side(name, causal):
    problem = random_problem(Sizes(batch=8, heads=8, key_heads=8, length=160, width=64, value_width=64), causal=causal)
    gradients = {"output": random_gradients(problem)["output"]}
    expected = run(problem, "native", gradients)
    side_by_side = getattr(problem, name).transpose(1, 2).contiguous().transpose(1, 2)
    setattr(problem, name, side_by_side)
    results = run(problem, "native", gradients)
    assert results["output"].nbytes >= LEAST_BYTES
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
