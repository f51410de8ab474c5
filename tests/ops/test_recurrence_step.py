"""One token at a time, as in decoding: one pass over the state, against the float64 reference and the whole."""

from __future__ import annotations

import math

import pytest
import torch
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    OPTIONS,
    Problem,
    Sizes,
    assert_light_keys_add_up,
    assert_non_finite_keys_are_what_they_are_in_the_formula,
    assert_results_are_close,
    in_pieces,
    outputs,
    random_problem,
)


@pytest.mark.isa
@pytest.mark.parametrize("option", OPTIONS)
def test_one_token(option):
    sizes = Sizes(batch=16, length=1, width=40, value_width=70)
    assert_results_are_close(random_problem(sizes, **OPTIONS[option](sizes)))


@pytest.mark.parametrize("sizes", [Sizes(1, 5, 5, 1, 200, 200), Sizes(14, 5, 5, 1, 64, 64)], ids=["five", "seventy"])
def test_a_token_does_not_depend_on_the_number_of_threads(sizes):
    """Fewer heads than threads, more, and more threads than there are shares of the work."""
    problem = random_problem(sizes, **OPTIONS["state"](sizes))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 40):
            torch.set_num_threads(threads)
            results.append(outputs(problem, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@EVERY_DTYPE
def test_one_token_after_the_other_gives_the_outputs_of_the_sequence(dtype):
    sizes = Sizes(length=70)
    problem = random_problem(sizes, dtype, key_gain=torch.randn(sizes.key_shape()))
    whole, one_by_one = outputs(problem, "native"), in_pieces(problem, range(71), "native")
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(one_by_one["output"], whole["output"], rtol=rounding, atol=2 * rounding)
    torch.testing.assert_close(one_by_one["memory"], whole["memory"], rtol=1e-5, atol=1e-5)


def exact_outputs(problem: Problem) -> torch.Tensor:
    """``q_t^T S_t`` in float64 from the definition, without a state or options."""
    weights = problem.key.double().exp()
    memory = (weights[..., None] * problem.value.double()[..., None, :]).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", problem.query.double() / weights.cumsum(2), memory)


@pytest.mark.isa
def test_ten_thousand_tokens_one_by_one_are_as_exact_as_one_call():
    """Every token is a ten-thousandth of the normaliser by then: what is lost of each adds up."""
    sizes = Sizes(batch=1, heads=4, key_heads=4, length=10_000, width=8, value_width=5)
    problem = random_problem(sizes)
    expected = exact_outputs(problem)
    one_by_one = in_pieces(problem, range(sizes.length + 1), "native")
    whole = outputs(problem, "native")
    for results in (one_by_one, whole):
        assert (results["output"] - expected).norm() < 1e-5 * expected.norm()
    # A float32 logarithm of 10,000 is a multiple of 1e-6, and each call rounds it.
    exact = problem.key.double().logsumexp(2)
    assert (one_by_one["log_normalizer"] - exact).mean().abs() < 1e-5
    assert (whole["log_normalizer"] - exact).abs().max() < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("piece", [1, 7])
def test_light_keys_are_not_lost_beside_a_heavy_state(piece):
    assert_light_keys_add_up(piece, "native")


@pytest.mark.isa
@CAUSAL
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 9])
def test_every_number_of_query_heads_to_a_key_head(group, causal):
    """Up to four at a time share a pass over the state, and the first pass alone writes it."""
    sizes = Sizes(batch=8, heads=2 * group, key_heads=2, length=1, width=20, value_width=37)
    assert_results_are_close(random_problem(sizes, causal=causal, **OPTIONS["everything"](sizes)))


@pytest.mark.isa
@CAUSAL
@pytest.mark.parametrize("option", ["plain", "state"])
@pytest.mark.parametrize("number", [-math.inf, math.nan, math.inf])
def test_non_finite_keys(number, option, causal):
    sizes = Sizes(batch=8, length=1, width=20, value_width=37)
    assert_non_finite_keys_are_what_they_are_in_the_formula(number, sizes, causal, option, "native")


@pytest.mark.isa
def test_a_key_that_climbs_far_enough_forgets_a_state_that_is_not_finite():
    sizes = Sizes(batch=2, length=1, width=20, value_width=37)
    problem = random_problem(sizes, ramp=150.0, **OPTIONS["state"](sizes))
    problem.options["initial_state"].memory[0, 0, 3, [5, 36]] = math.nan
    results = outputs(problem, "native")
    assert all(tensor.isfinite().all() for tensor in results.values())
