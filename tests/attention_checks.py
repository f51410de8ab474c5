"""Comparing outputs and gradients of a backend with the float64 reference, under the rule of tolerance.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attention_cases import Problem, outputs, run, shuffled
from tolerance import Comparison, assert_close_to_reference
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
    acts on them like a gradient of the log of the sum by which the row's final weights are divided.
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
        leaf = option.detach().requires_grad_()
        watched = replace(exact, options={**exact.options, name: leaf})
        divisor = log_of_divisor(watched, weighting)
        results = outputs(watched, weighting, "reference", watched.options)
        rounded = results[0].detach() * (0 if gradients[0] is None else gradients[0])
        draws = []
        for sign in torch.randint(2, (8, batch, heads, queries)) * 2 - 1:
            signed = {
                result: (gradient * sign.view(sign.shape + (1,) * (gradient.dim() - 3))).to(result.dtype)
                for result, gradient in zip(results, gradients, strict=True)
                if gradient is not None
            }
            (terms,) = torch.autograd.grad(list(signed), leaf, list(signed.values()), retain_graph=True)
            (of_rounding,) = torch.autograd.grad(divisor, leaf, rounded.norm(dim=-1) * sign, retain_graph=True)
            draws.append(terms.square() + of_rounding.square())
        return torch.stack(draws).mean(0).sqrt()
    return None


def log_of_divisor(problem: Problem, weighting: Any) -> Tensor:
    """ln Z_i, or under re-weighting ln sum_j (f_ij - mu_i)^p, (B, H, M): differentiable, by the reference."""
    torch.manual_seed(problem.seed)
    observed = sl.Observe(log_normalizer=True)
    inputs = problem.query, problem.key, problem.value
    _, stats = sl.attention(*inputs, weighting=weighting, observe=observed, backend="reference", **problem.options)
    reweight = weighting.reweight
    if reweight is None:
        return stats.log_normalizer
    rows = torch.arange(problem.query.shape[2])
    options = {name: option for name, option in problem.options.items() if name != "dropout_p"}
    plain = sl.attention_rows(problem.query, problem.key, rows, weighting=replace(weighting, reweight=None), **options)
    sharp = sl.attention_rows(problem.query, problem.key, rows, weighting=weighting, **options)
    visible = (plain > 0).sum(-1)
    largest = plain.amax(-1)
    offset = torch.where(visible <= reweight.exempt_rows, 0.0, reweight.offset) / visible.clamp(min=1)
    # The largest final weight is (f - mu)^p over the divisor, with f = a Z.
    is_sharp = largest - offset > 2**-16 * largest
    excess = torch.where(is_sharp, largest - offset, 1.0)
    final = torch.where(is_sharp, sharp.amax(-1), 1.0)
    divisor = reweight.power * (excess.log() + stats.log_normalizer) - final.log()
    return torch.where(is_sharp, divisor, stats.log_normalizer)


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


def assert_outputs_are_close(
    problem: Problem, weighting: Any, compute: Callable[[Problem], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Compare the outputs that `compute` makes of a problem with the float64 reference, and return them."""

    def compare(problem: Problem) -> dict[str, Comparison]:
        actual = compute(problem)
        reference = run(problem.to(torch.float64), weighting, "reference")
        in_dtype = run(problem, weighting, "reference")
        return {name: Comparison(actual[name], reference[name], in_dtype[name]) for name in actual}

    comparisons = compare(problem)
    for name, comparison in comparisons.items():
        assert_close_to_reference(
            comparison,
            name=name,
            reweighted=weighting.reweight is not None,
            redraw=partial(lambda name, turn: compare(problem.redrawn(turn))[name], name),
        )
    return {name: comparison.actual for name, comparison in comparisons.items()}


def assert_results_are_close(
    problem: Problem,
    weighting: Any,
    backend: str,
    gradients: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    outputs: bool = False,
) -> dict[str, Tensor]:
    """Compare every gradient, and where asked both outputs, with the float64 reference, and return all of them.

    The gradients of both outputs are random unless given.
    """
    gradients = random_gradients(problem) if gradients is None else gradients
    reweighted = weighting.reweight is not None

    def compare(problem: Problem, gradients: Any, names: tuple[str, ...] | None = None) -> dict[str, Comparison]:
        exact = problem.to(torch.float64)
        if reweighted and weighting.reweight.power == 1:
            gradients = without_rows_on_the_kink(exact, weighting, gradients)
        actual = run(problem, weighting, backend, *gradients)
        reference = run(exact, weighting, "reference", *gradients)
        in_dtype = run(problem, weighting, "reference", *gradients)
        assert actual.keys() == reference.keys()
        return {
            name: Comparison(
                actual[name],
                reference[name],
                in_dtype[name],
                size_without_cancellation(exact, weighting, name, gradients),
            )
            for name in names or actual
        }

    def compare_again(name: str, turn: int) -> Comparison:
        order = torch.Generator(device=problem.query.device).manual_seed(turn)
        others = [None if gradient is None else shuffled(gradient, order) for gradient in gradients]
        return compare(problem.redrawn(turn), others, (name,))[name]

    comparisons = compare(problem, gradients)
    for name, comparison in comparisons.items():
        redraw = partial(compare_again, name)
        if name in ("output", "log_normalizer"):
            if outputs:
                assert_close_to_reference(comparison, name=name, reweighted=reweighted, redraw=redraw)
            continue
        option = problem.options.get(name)
        leaf = getattr(problem, name) if option is None else option
        assert comparison.actual.dtype == leaf.dtype, name
        assert_close_to_reference(
            comparison,
            name=f"gradient of {name}",
            dtype=problem.query.dtype,
            gradient=True,
            reweighted=reweighted,
            redraw=redraw,
        )
    return {name: comparison.actual for name, comparison in comparisons.items()}
