"""What numbers that are not finite reach in the native additive recurrence, and what they do not, both ways."""

from __future__ import annotations

import math

import pytest
import torch
from recurrence_cases import (
    CAUSAL,
    EVERY_DTYPE,
    ON_EVERY_ISA,
    PACKINGS,
    Sizes,
    assert_a_state_that_is_not_finite_stays_so,
    assert_non_finite_keys_are_what_they_are_in_the_formula,
    outputs,
    random_gradients,
    random_problem,
    run,
)
from tolerance import assert_equal_but_for_rounding

import sightline as sl


def test_a_non_finite_value_of_a_late_segment_reaches_its_column_alone():
    problem = random_problem(Sizes(batch=1, length=5_000), causal=False)
    clean = outputs(problem, "native")["output"]
    problem.value[0, 1, 4_000, 7] = math.nan
    spoilt = outputs(problem, "native")["output"]
    assert spoilt[:, 2:, :, 7].isnan().all()
    spoilt[:, 2:, :, 7] = clean[:, 2:, :, 7]
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("segment", [0, 1])
def test_a_channel_whose_only_key_of_a_segment_is_nan_stays_nan(segment):
    """Segments have at least 2,048 rows; the other one has keys of its own in that channel, or none."""
    problem = random_problem(Sizes(batch=1, heads=1, key_heads=1, length=4_096), causal=False)
    rows = slice(2_048 * segment, 2_048 * segment + 2_048)
    problem.key[..., rows, 3] = -math.inf
    problem.key[..., 2_048 * segment + 5, 3] = math.nan
    gradients = random_gradients(problem)
    found, expected = (run(problem, backend, gradients) for backend in ("native", "reference"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.isnan(), expected[name].isnan(), msg=name)


@pytest.mark.isa
@EVERY_DTYPE
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("row", [0, 20, 100])
def test_a_non_finite_number_reaches_later_outputs_of_its_own_head_alone(dtype, number, where, row):
    problem = random_problem(Sizes(length=150), dtype)
    clean = outputs(problem, "native")
    getattr(problem, where)[0, 1, row, 3] = number
    spoilt = outputs(problem, "native")
    heads = [1] if where == "query" else [2, 3]
    touched = torch.zeros(2, 4, 150, dtype=torch.bool)
    touched[0, heads, row : row + 1 if where == "query" else None] = True
    assert torch.equal(spoilt["output"][~touched], clean["output"][~touched])
    assert not spoilt["output"][touched].isfinite().all(-1).any()
    states = torch.zeros(2, 2, dtype=torch.bool)
    states[0, 1] = where != "query"
    assert torch.equal(spoilt["memory"][~states], clean["memory"][~states])


@CAUSAL
@EVERY_DTYPE
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_non_finite_number_stays_in_its_document_and_head(packing, dtype, causal, where):
    sizes = Sizes(batch=1)
    problem = random_problem(sizes, dtype, causal=causal, **PACKINGS[packing](sizes))
    document, begin, end, row = problem.row_in_a_document()
    gradients = random_gradients(problem)
    clean = run(problem, "native", gradients)
    getattr(problem, where)[0, 1, row, 3] = math.nan
    spoilt = run(problem, "native", gradients)
    assert spoilt["output"][0, 2:, row if causal else begin : end].isnan().any(-1).all()
    for name, tensor in spoilt.items():
        of_states = "log_normalizer" in name or "memory" in name
        heads = slice(2, None) if tensor.shape[1] == 4 else slice(1, None)
        own = (document, heads) if of_states else (0, heads, slice(begin, end))
        others = torch.ones(tensor.shape, dtype=torch.bool)
        others[own] = False
        assert torch.equal(tensor[others], clean[name][others]), name


@EVERY_DTYPE
@pytest.mark.parametrize("row", [3, 8, 64, 70, 142])
def test_an_infinite_key_cuts_its_chunk_short_and_changes_earlier_outputs_by_rounding_alone(dtype, row):
    """Fewer rows than the tile unit takes are multiplied in fp32, which rounds elsewhere in 16 bits."""
    problem = random_problem(Sizes(length=150), dtype)
    clean = outputs(problem, "native")["output"]
    problem.key[0, 1, row, 3] = math.inf
    spoilt = outputs(problem, "native")["output"]
    assert not spoilt[0, 2:, row:].isfinite().all(-1).any()
    assert torch.equal(spoilt[1], clean[1])
    assert torch.equal(spoilt[0, :2], clean[0, :2])
    assert_equal_but_for_rounding(spoilt[0, 2:, :row], clean[0, 2:, :row])


@pytest.mark.isa
@EVERY_DTYPE
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [True, False])
def test_a_state_that_is_not_finite_stays_so_over_tokens_that_add_nothing(dtype, number, masked):
    assert_a_state_that_is_not_finite_stays_so(number, masked, dtype, "native")


@EVERY_DTYPE
@pytest.mark.parametrize("length", [1, 2, 150])
def test_beside_an_infinite_normaliser_nothing_is_a_number(dtype, length):
    problem = random_problem(Sizes(length=length), dtype)
    results = {}
    for backend in ("native", "reference"):
        state = sl.RecurrenceState(
            torch.zeros(2, 2, problem.query.shape[3]),
            torch.ones(*problem.key.shape[:2], problem.key.shape[3], problem.value.shape[3]),
        )
        state.log_normalizer[0, 1, 3] = math.inf
        results[backend], final = sl.additive_recurrence(
            problem.query, problem.key, problem.value, initial_state=state, output_final_state=True, backend=backend
        )
        assert final.memory[0, 1, 3].isnan().all()
    assert torch.equal(results["native"].isfinite(), results["reference"].isfinite())
    assert results["native"][0, 2:].isnan().all()


@CAUSAL
@EVERY_DTYPE
@pytest.mark.parametrize("option", ["plain", ON_EVERY_ISA("everything")])
@pytest.mark.parametrize("number", [-math.inf, math.nan, math.inf])
def test_non_finite_keys_forward_and_backward(number, option, dtype, causal):
    sizes = Sizes(length=150)
    assert_non_finite_keys_are_what_they_are_in_the_formula(number, sizes, causal, option, "native", dtype)


@CAUSAL
@EVERY_DTYPE
def test_masked_keys_may_hold_anything(dtype, causal):
    sizes = Sizes(length=150)
    mask = torch.rand(2, 150) < 0.6
    problem = random_problem(sizes, dtype, causal=causal, key_mask=mask, key_gain=torch.randn(sizes.key_shape()))
    gradients = random_gradients(problem)
    expected = run(problem, "native", gradients)
    off = ~mask[:, None, :, None]
    for tensor in (problem.key, problem.value, problem.options["key_gain"]):
        tensor.masked_fill_(off, math.nan)
    results = run(problem, "native", gradients)
    for name, tensor in results.items():
        assert torch.equal(tensor, expected[name]), name
    for name in ("key", "value", "key_gain"):
        assert not results[name][off.expand_as(results[name])].any(), name


@EVERY_DTYPE
def test_a_gradient_that_is_not_finite_reaches_earlier_rows_alone(dtype):
    problem = random_problem(Sizes(length=150), dtype)
    gradients = {"output": torch.randn(2, 4, 150, 37)}
    clean = run(problem, "native", gradients)
    gradients["output"][1, 0, 70, 5] = math.nan
    spoilt = run(problem, "native", gradients)
    for name in ("key", "value"):
        touched = torch.zeros(2, 2, 150, dtype=torch.bool)
        touched[1, 0, :71] = True
        assert_equal_but_for_rounding(spoilt[name][~touched], clean[name][~touched])
        assert spoilt[name][touched].isnan().any(-1).all()


@EVERY_DTYPE
def test_keys_that_climb_far_enough_forget_a_value_that_is_not_finite(dtype):
    problem = random_problem(Sizes(batch=1, length=150), dtype)
    problem.key[:, :, 0] = 0.0
    problem.key[:, :, 70:] += 150.0
    problem.value[0, 1, 0, 5] = math.nan
    results = run(problem, "native", {"output": torch.randn(1, 4, 150, 37)})
    assert results["output"][:, 2:, 69].isnan().any(-1).all()
    for name in ("output", "query"):
        assert results[name][:, :, 70:].isfinite().all(), name
