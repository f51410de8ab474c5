"""A NaN or infinity reaches the rows and keys that give it non-zero weight, and nothing else (MATH.md, section 1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, MAIN_WEIGHTINGS, WEIGHTINGS, Problem, Sizes, random_problem, run
from tolerance import FROBENIUS_BOUND, GRADIENT_FACTOR
from torch import Tensor

import sightline as sl

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
CHOSEN = ("softmax", "capped", "cosine", "lssa", "raw_softplus", "lssar", "lssar1", "lssar2.5")
every_weighting = pytest.mark.parametrize("weighting", [WEIGHTINGS[name] for name in CHOSEN], ids=CHOSEN)
every_poison = pytest.mark.parametrize("poison", [math.nan, -math.inf], ids=["nan", "-inf"])

SIZES = Sizes(batch=2, heads=4, key_heads=2, queries=150, keys=150, width=16, value_width=20)
# What is hit: batch entry, key head (query heads 2 and 3), and a key or query row in the second tile, off its edges.
BATCH, KEY_HEAD, HEADS, PLACE = 1, 1, slice(2, 4), 77
VISIBILITIES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (20, None)},
    "masked": {"key_mask": torch.arange(150).expand(2, 150) != PLACE},
}
# Who sees what is decided before weights are made: every way to see meets the main weightings, every weighting one way.
every_view = pytest.mark.parametrize(
    ("visibility", "weighting"),
    [
        pytest.param(
            visibility,
            WEIGHTINGS[name],
            id=f"{visibility}-{name}",
            marks=[pytest.mark.isa] if visibility == "causal" and name in MAIN_WEIGHTINGS else [],
        )
        for visibility in VISIBILITIES
        for name in CHOSEN
        if visibility == "causal" or name in MAIN_WEIGHTINGS
    ],
)


def seen(visibility: str) -> Tensor:
    """(M, N): which pairs are visible."""
    distance = torch.arange(150).view(-1, 1) - torch.arange(150)
    options = VISIBILITIES[visibility]
    visible = torch.ones(150, 150, dtype=torch.bool)
    if options.get("causal"):
        visible &= distance >= 0
    if "window" in options:
        visible &= distance <= 20
    if "key_mask" in options:
        visible &= options["key_mask"][0]
    return visible


def gradients_of(problem: Problem) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 150, 20).to(problem.query.dtype), torch.randn(2, 4, 150)


def assert_unchanged(actual: Tensor, clean: Tensor, name: str) -> None:
    """Close as a whole: rows beside non-finite numbers are computed in another order, or without rounding weights."""
    assert actual.isfinite().all(), f"{name}: a non-finite number reached what cannot see it"
    error = (actual.double() - clean.double()).norm() / clean.double().norm()
    bound = GRADIENT_FACTOR * FROBENIUS_BOUND[clean.dtype]
    assert error < bound, f"{name}: relative Frobenius error {float(error):.2e} exceeds {bound:.1e}"


def assert_untouched_except(actual: Tensor, clean: Tensor, reached: Tensor, heads: slice | int, name: str) -> None:
    """(B, H or Hk, rows, width): outside of batch entry, heads and rows that are reached, nothing has changed."""
    others = torch.ones(actual.shape[:3], dtype=torch.bool)
    others[BATCH, heads] &= ~reached
    assert_unchanged(actual[others], clean[others], name)


@every_dtype
@every_view
@every_poison
def test_a_value_reaches_the_rows_that_weigh_it(
    poison: float, visibility: str, weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(SIZES, dtype, **VISIBILITIES[visibility])
    clean = run(problem, weighting, "native")
    weights = sl.attention_rows(
        problem.query.double(), problem.key.double(), torch.arange(150), weighting=weighting, **problem.options
    )[BATCH, HEADS, :, PLACE]
    problem.value[BATCH, KEY_HEAD, PLACE, 3] = poison
    result = run(problem, weighting, "native")
    assert torch.equal(result["log_normalizer"], clean["log_normalizer"])

    visible = seen(visibility)[:, PLACE]
    touched = ~result["output"].isfinite()
    assert_untouched_except(result["output"], clean["output"], visible, HEADS, "output")
    # A weight may underflow to 0 in the kernel, or not: certain is what is far from it.
    assert touched[BATCH, HEADS, :, 3][weights > 1e-30].all()
    assert not touched[BATCH, HEADS, :, 3][weights == 0].any()
    hit = result["output"][BATCH, HEADS, :, 3][touched[BATCH, HEADS, :, 3]]
    assert hit.isnan().all() if math.isnan(poison) else (hit == poison).all()
    columns = [column for column in range(20) if column != 3]
    assert_unchanged(result["output"][..., columns], clean["output"][..., columns], "output")


@every_dtype
@every_view
@every_poison
def test_a_value_reaches_the_gradients_of_the_rows_that_see_it(
    poison: float, visibility: str, weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(SIZES, dtype, **VISIBILITIES[visibility])
    gradients = gradients_of(problem)
    clean = run(problem, weighting, "native", *gradients)
    problem.value[BATCH, KEY_HEAD, PLACE, 3] = poison
    result = run(problem, weighting, "native", *gradients)

    visible = seen(visibility)
    rows = visible[:, PLACE]
    assert_untouched_except(result["query"], clean["query"], rows, HEADS, "gradient of query")
    assert_untouched_except(result["key"], clean["key"], visible[rows].any(0), KEY_HEAD, "gradient of key")
    assert_unchanged(result["value"], clean["value"], "gradient of value")


@every_dtype
@every_view
@every_poison
def test_a_key_reaches_the_rows_that_see_it(poison: float, visibility: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(SIZES, dtype, **VISIBILITIES[visibility])
    gradients = gradients_of(problem)
    clean = run(problem, weighting, "native", *gradients)
    problem.key[BATCH, KEY_HEAD, PLACE, 3] = poison
    result = run(problem, weighting, "native", *gradients)

    visible = seen(visibility)
    rows = visible[:, PLACE]
    assert_untouched_except(result["output"], clean["output"], rows, HEADS, "output")
    assert_untouched_except(result["query"], clean["query"], rows, HEADS, "gradient of query")
    # The rows that it reached carry it to every key that they see.
    keys = visible[rows].any(0)
    assert_untouched_except(result["key"], clean["key"], keys, KEY_HEAD, "gradient of key")
    assert_untouched_except(result["value"], clean["value"], keys, KEY_HEAD, "gradient of value")
    if math.isnan(poison):
        assert result["output"][BATCH, HEADS][:, rows].isnan().all()
        assert result["log_normalizer"][BATCH, HEADS][:, rows].isnan().all()


@every_dtype
@pytest.mark.isa
@pytest.mark.parametrize("sign", [1, -1])
def test_a_key_of_minus_infinite_score_has_weight_0(sign: int, dtype: torch.dtype) -> None:
    problem = random_problem(SIZES, dtype)
    problem.query[..., 3] = sign * problem.query[..., 3].abs() + sign
    problem.key[:, :, PLACE, 3] = -sign * math.inf
    result = run(problem, sl.Softmax(), "native")
    without = [
        torch.cat((tensor[:, :, :PLACE], tensor[:, :, PLACE + 1 :]), 2) for tensor in (problem.key, problem.value)
    ]
    expected = run(Problem(problem.query, *without, problem.options), sl.Softmax(), "native")
    for name in ("output", "log_normalizer"):
        assert_unchanged(result[name], expected[name], name)


@every_dtype
@every_view
@every_poison
def test_a_query_reaches_its_own_row(poison: float, visibility: str, weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(SIZES, dtype, **VISIBILITIES[visibility])
    gradients = gradients_of(problem)
    clean = run(problem, weighting, "native", *gradients)
    problem.query[BATCH, 2, PLACE, 3] = poison
    result = run(problem, weighting, "native", *gradients)

    row = torch.arange(150) == PLACE
    assert_untouched_except(result["output"], clean["output"], row, 2, "output")
    assert_untouched_except(result["query"], clean["query"], row, 2, "gradient of query")
    keys = seen(visibility)[PLACE]
    assert_untouched_except(result["key"], clean["key"], keys, KEY_HEAD, "gradient of key")
    assert_untouched_except(result["value"], clean["value"], keys, KEY_HEAD, "gradient of value")
    if math.isnan(poison):
        assert result["output"][BATCH, 2, PLACE].isnan().all()


@every_dtype
@every_view
@every_poison
def test_a_gradient_of_the_output_reaches_its_own_row(
    poison: float, visibility: str, weighting: Any, dtype: torch.dtype
) -> None:
    problem = random_problem(SIZES, dtype, **VISIBILITIES[visibility])
    grad_output, grad_log_normalizer = gradients_of(problem)
    clean = run(problem, weighting, "native", grad_output, grad_log_normalizer)
    grad_output[BATCH, 2, PLACE, 3] = poison
    result = run(problem, weighting, "native", grad_output, grad_log_normalizer)

    row = torch.arange(150) == PLACE
    keys = seen(visibility)[PLACE]
    assert_untouched_except(result["query"], clean["query"], row, 2, "gradient of query")
    assert_untouched_except(result["key"], clean["key"], keys, KEY_HEAD, "gradient of key")
    assert_untouched_except(result["value"], clean["value"], keys, KEY_HEAD, "gradient of value")
    assert result["value"][..., :3].isfinite().all()
    assert result["value"][..., 4:].isfinite().all()
    assert not result["query"][BATCH, 2, PLACE].isfinite().all()


@every_dtype
@every_weighting
def test_masked_keys_may_hold_anything(weighting: Any, dtype: torch.dtype) -> None:
    problem = random_problem(SIZES, dtype, key_lengths=torch.tensor([150, 90]), causal=True)
    gradients = gradients_of(problem)
    clean = run(problem, weighting, "native", *gradients)
    problem.key[1, :, 90:] = math.nan
    problem.value[1, :, 90:] = math.inf
    result = run(problem, weighting, "native", *gradients)
    for name in ("output", "query", "key", "value"):
        assert_unchanged(result[name], clean[name], name)
    assert (result["key"][1, :, 90:] == 0).all()
    assert (result["value"][1, :, 90:] == 0).all()


@every_weighting
@pytest.mark.parametrize("gradient_of", ["attn_mask", "scale"])
def test_gradients_of_options_stay_finite_when_only_hidden_keys_are_not(gradient_of: str, weighting: Any) -> None:
    mask = torch.zeros(150, 150)
    mask[:, PLACE] = -math.inf
    options = {"attn_mask": mask, "scale": torch.ones(4)}
    problem = random_problem(SIZES, torch.float32, **options)
    problem.key[:, :, PLACE] = math.nan
    problem.value[:, :, PLACE] = math.nan
    result = run(problem, weighting, "native", *gradients_of(problem))
    assert result[gradient_of].isfinite().all()
    assert result["query"].isfinite().all()


@pytest.mark.isa
@every_dtype
@pytest.mark.parametrize("weighting", ["raw_softplus", "raw_sharp"])
@pytest.mark.parametrize("queries", [1, 2, 70])
def test_a_row_whose_weights_have_no_finite_sum_is_not_a_number(
    queries: int, weighting: str, dtype: torch.dtype
) -> None:
    chosen = {
        "raw_softplus": sl.Softplus(length_scale=False, normalize_qk=False),
        "raw_sharp": sl.Softplus(length_scale=False, normalize_qk=False, reweight=sl.Reweight(power=3.0)),
    }[weighting]
    query, key, value = torch.ones(1, 1, queries, 32), torch.rand(1, 1, 9, 32), torch.ones(1, 1, 9, 32)
    query[0, 0, 0, 3] = math.inf
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    results = {}
    for backend in ("native", "reference"):
        with torch.no_grad():
            alone = sl.attention(*inputs, weighting=chosen, backend=backend)
        output = sl.attention(*inputs, weighting=chosen, backend=backend)
        assert torch.equal(alone.isnan(), output.isnan())
        results[backend] = output, *torch.autograd.grad(output.sum(), inputs)
    assert results["native"][0][0, 0, 0].isnan().all()
    assert results["native"][0][0, 0, 1:].isfinite().all()
    assert torch.equal(results["native"][0].isnan(), results["reference"][0].isnan())
    assert not results["native"][1][0, 0, 0].isfinite().any()
    assert not results["native"][2].isfinite().any()


@pytest.mark.isa
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("width", [16, 32])
def test_weights_near_the_end_of_float32_still_have_a_sum(queries: int, width: int) -> None:
    """40 weights of 5e36 add up to 2e38, one over which is no normal number."""
    query = torch.full((1, 1, queries, width), math.sqrt(5e36 / width))
    key = query[:, :, :1].expand(1, 1, 40, width)
    value = torch.rand(1, 1, 40, width) + 0.1
    weighting = sl.Softplus(length_scale=False, normalize_qk=False)
    output = sl.attention(query, key, value, weighting=weighting, scale=1.0, backend="native")
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))


@every_dtype
def test_a_row_that_sees_nothing_gives_its_sink_no_gradient(dtype: torch.dtype) -> None:
    query, key, value = (torch.rand(2, 1, 4, 16).to(dtype) for _ in range(3))
    sinks = torch.zeros(1, requires_grad=True)
    lengths = torch.tensor([4, 2])
    output = sl.attention(query, key, value, sinks=sinks, causal=True, key_lengths=lengths, backend="native")
    assert not output[1, :, :2].any()
    grad_output = torch.rand_like(output)
    (expected,) = torch.autograd.grad(output, sinks, grad_output, retain_graph=True)
    grad_output[1, :, :2] = math.nan
    (gradient,) = torch.autograd.grad(output, sinks, grad_output)
    bound = GRADIENT_FACTOR * FROBENIUS_BOUND[dtype]  # rows beside one that is not finite may be rounded elsewhere
    torch.testing.assert_close(gradient, expected, rtol=bound, atol=0)


@every_dtype
@every_weighting
def test_the_gradient_of_the_log_normaliser_does_not_know_the_values(weighting: Any, dtype: torch.dtype) -> None:
    inputs = [torch.rand(1, 2, 5, 16).to(dtype).requires_grad_() for _ in range(3)]

    def gradients() -> Any:
        observe = sl.Observe(log_normalizer=True)
        _, stats = sl.attention(*inputs, weighting=weighting, observe=observe, backend="native")
        return torch.autograd.grad(stats.log_normalizer.sum(), inputs)

    expected = gradients()
    with torch.no_grad():
        inputs[2][0, 0, 1, 1] = math.nan
    for gradient, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(gradient, wanted)
    assert not expected[2].any()
