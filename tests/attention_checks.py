"""Comparing outputs and gradients of a backend with the float64 reference, under the rule of tolerance.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from attention_cases import Problem, run
from tolerance import assert_close_to_reference
from torch import Tensor

import sightline as sl


def random_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of output and log_normalizer."""
    batch, heads, queries, _ = problem.query.shape
    grad_output = torch.randn(batch, heads, queries, problem.value.shape[3]).to(problem.query.dtype)
    return grad_output, torch.randn(batch, heads, queries)


def size_without_cancellation(exact: Problem, weighting: Any, name: str, gradients: Any) -> Tensor | None:
    """How large the gradient of a broadcast option would be if its sum over rows did not cancel; None for the others.

    A gradient of attn_mask is the sum of that of the mask written out to (B, H, M, N). The terms of `sinks` and `scale`
    are added with random signs instead, and a rounding error of <do, o>, taken from the output as rounded to its dtype,
    acts on them like a gradient of the log normaliser.
    """
    option = exact.options.get(name)
    batch, heads, queries, _ = exact.query.shape
    if name == "attn_mask" and option.shape != (batch, heads, queries, exact.key.shape[2]):
        whole = option.expand(batch, heads, queries, exact.key.shape[2]).contiguous()
        options = {**exact.options, "attn_mask": whole}
        written_out = Problem(exact.query, exact.key, exact.value, options, exact.seed)
        terms = run(written_out, weighting, "reference", *gradients)["attn_mask"]
        return terms.abs().sum_to_size(option.shape)
    if name in ("sinks", "scale"):
        grad_output, grad_log_normalizer = gradients
        rounded = run(exact, weighting, "reference")["output"] * (0 if grad_output is None else grad_output)
        products = rounded.norm(dim=-1) + (0 if grad_log_normalizer is None else grad_log_normalizer.abs())
        draws = []
        for _ in range(3):
            sign = torch.randint(2, (batch, heads, queries)) * 2 - 1
            signed = None if grad_output is None else grad_output * sign[..., None]
            draws.append(run(exact, weighting, "reference", signed, products * sign)[name])
        return torch.stack(draws).square().mean(0).sqrt()
    return None


def without_rows_on_the_kink(problem: Problem, weighting: Any, gradients: Any) -> Any:
    """The gradients, zeroed in rows in which a key is at the mean: at power 1 there is no derivative there."""
    options = {name: option for name, option in problem.options.items() if name != "dropout_p"}
    rows = torch.arange(problem.query.shape[2])
    plain = replace(weighting, reweight=None)
    weights = sl.attention_rows(problem.query, problem.key, rows, weighting=plain, **options)
    relative = weights * (weights > 0).sum(-1, keepdim=True)
    clear = ((relative - weighting.reweight.offset).abs() > 1e-5).all(-1)
    grad_output, grad_log_normalizer = gradients
    return (
        None if grad_output is None else grad_output * clear[..., None],
        None if grad_log_normalizer is None else grad_log_normalizer * clear,
    )


def assert_results_are_close(
    problem: Problem,
    weighting: Any,
    backend: str,
    gradients: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    outputs: bool = False,
) -> dict[str, Tensor]:
    """Compare every gradient, and where asked both outputs, with the float64 reference.

    The gradients of both outputs are random unless given.
    """
    gradients = random_gradients(problem) if gradients is None else gradients
    exact = problem.to(torch.float64)
    if weighting.reweight is not None and weighting.reweight.power == 1:
        gradients = without_rows_on_the_kink(exact, weighting, gradients)
    results = run(problem, weighting, backend, *gradients)
    reference = run(exact, weighting, "reference", *gradients)
    in_dtype = run(problem, weighting, "reference", *gradients)
    assert results.keys() == reference.keys()
    reweighted = weighting.reweight is not None
    for name in results:
        if name in ("output", "log_normalizer"):
            if outputs:
                assert_close_to_reference(
                    results[name], reference[name], in_dtype[name], name=name, reweighted=reweighted
                )
            continue
        if name == "scale" and reweighted and problem.query.dtype != torch.float32:
            # Rows of few keys cancel down to the rounding of <do, o>, which is many times larger than what remains.
            continue
        option = problem.options.get(name)
        leaf = getattr(problem, name) if option is None else option
        assert results[name].dtype == leaf.dtype, name
        assert_close_to_reference(
            results[name],
            reference[name],
            in_dtype[name],
            name=f"gradient of {name}",
            dtype=problem.query.dtype,
            gradient=True,
            reweighted=reweighted,
            magnitude=size_without_cancellation(exact, weighting, name, gradients),
        )
    return results
