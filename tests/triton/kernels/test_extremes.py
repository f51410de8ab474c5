"""Numbers that are not finite, rows and keys that are not there, and other ends of the range, forward and backward."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, MAIN_WEIGHTINGS, WEIGHTINGS, Sizes, random_problem, run
from attention_checks import assert_results_are_close, random_gradients

import sightline as sl

assert_triton_is_close = partial(assert_results_are_close, backend="triton", outputs=True)

main_weightings = pytest.mark.parametrize("weighting", MAIN_WEIGHTINGS.values(), ids=MAIN_WEIGHTINGS.keys())
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


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


@main_weightings
@pytest.mark.parametrize(("poison", "dtype"), zip((math.nan, math.inf, -math.inf), DTYPES.values(), strict=True))
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
