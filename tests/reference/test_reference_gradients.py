from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.reference import attention
from sightline.weighting import LSSA, LSSAR, Softmax, Softplus


def test_flat_row_is_plain_attention_with_its_gradient(random_inputs: Any) -> None:
    _, _, value = random_inputs(5, 5, key_heads=4)
    query = torch.randn(2, 4, 1, 6, dtype=torch.float64).expand(2, 4, 5, 6)
    key = torch.randn(2, 4, 1, 6, dtype=torch.float64).repeat(1, 1, 5, 1)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    sharp, _ = attention(*leaves, weighting=LSSAR())
    plain, _ = attention(*leaves, weighting=LSSA())
    torch.testing.assert_close(sharp, plain, rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(sharp)
    gradients = torch.autograd.grad(sharp, leaves, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, leaves, upstream))
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("score", [-80.0, -20.0, -1.0, 0.0, 3.0, 25.0, 60.0])
def test_softplus_and_its_derivative_are_exact_far_from_zero(score: float) -> None:
    query = torch.tensor([[[[score]]]], dtype=torch.float64, requires_grad=True)
    unit = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    weighting = Softplus(length_scale=False, normalize_qk=False)
    _, log_normalizer = attention(query, unit, unit, weighting=weighting, scale=1.0)
    softplus = max(score, 0.0) + math.log1p(math.exp(-abs(score)))
    torch.testing.assert_close(log_normalizer.item(), math.log(softplus), rtol=1e-14, atol=1e-15)
    (gradient,) = torch.autograd.grad(log_normalizer.sum(), query)
    sigmoid = math.exp(min(score, 0.0)) / (1 + math.exp(-abs(score)))
    torch.testing.assert_close(gradient.item(), sigmoid / softplus, rtol=1e-13, atol=0)


def test_row_whose_weights_all_underflow_counts_as_empty() -> None:
    query = torch.full((1, 1, 1, 1), -800.0, dtype=torch.float64, requires_grad=True)
    unit = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    weighting = Softplus(length_scale=False, normalize_qk=False)
    output, log_normalizer = attention(query, unit, unit, weighting=weighting, scale=1.0)
    assert output.item() == 0
    assert log_normalizer.item() == -math.inf
    (gradient,) = torch.autograd.grad(output.sum() + log_normalizer.sum(), query)
    assert gradient.item() == 0


GRADIENT_OPTIONS = {
    "plain": dict,
    "causal_with_empty_rows": lambda: {"causal": True, "key_lengths": torch.tensor([5, 2])},
    "key_mask": lambda: {"key_mask": torch.tensor([[True, False, True, True, False], [False] * 5])},
    "window": lambda: {"window": (1, 0)},
    "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])},
    "zero_scale": lambda: {"scale": 0.0},
    "chosen_rows": lambda: {"rows": torch.tensor([3, 1, 1])},
}


@pytest.mark.parametrize("option", GRADIENT_OPTIONS.values(), ids=GRADIENT_OPTIONS.keys())
def test_gradients_of_output_and_log_normalizer(random_inputs: Any, weighting: Any, option: Any) -> None:
    # Differences are taken by every number: no more of them than show heads that share keys and rows that see none.
    inputs = [tensor.requires_grad_() for tensor in random_inputs(4, 5, heads=2, key_heads=1, width=3, value_width=2)]
    options = option()

    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        output, log_normalizer = attention(*leaves, weighting=weighting, **options)
        return output, torch.where(log_normalizer.isfinite(), log_normalizer, 0)

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize(
    "weighting",
    [Softmax(), Softmax(length_scale=True, softcap=1.0), LSSA(), LSSAR(3.0)],
    ids=["softmax", "capped", "lssa", "lssar"],
)
def test_gradients_of_mask_scale_and_sinks(random_inputs: Any, weighting: Any) -> None:
    query, key, value = random_inputs(4, 5, heads=2, key_heads=1, width=3)
    mask = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    mask[0, 0, 1, 2] = mask[0, 1, 3] = -torch.inf
    hidden = mask == -torch.inf
    scale = torch.tensor([0.0, 0.8], dtype=torch.float64, requires_grad=True)
    sinks = torch.tensor([0.4, -0.9], dtype=torch.float64, requires_grad=True)
    with_sinks = weighting.kind == "softmax"

    def outputs(mask: Tensor, scale: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        output, log_normalizer = attention(
            query,
            key,
            value,
            weighting=weighting,
            attn_mask=torch.where(hidden, -torch.inf, mask),
            scale=scale,
            sinks=sinks if with_sinks else None,
            causal=True,
        )
        return output, torch.where(log_normalizer.isfinite(), log_normalizer, 0)

    finite = torch.where(hidden, 0, mask).requires_grad_()
    # Row 3 of the second head sees no key: its log normalizer is the sink, without a gradient, so it stays out here.
    if with_sinks:
        assert torch.autograd.gradcheck(lambda *leaves: outputs(*leaves)[0], (finite, scale, sinks))
        assert torch.autograd.gradcheck(lambda *leaves: outputs(*leaves)[1][:, 0], (finite, scale, sinks))
    else:
        assert torch.autograd.gradcheck(lambda mask, scale: outputs(mask, scale, sinks), (finite, scale))


@pytest.mark.parametrize("weighting", [Softmax(), LSSA(), LSSAR()], ids=["softmax", "lssa", "lssar"])
def test_mask_itself_gets_a_finite_gradient_where_it_is_minus_infinity(random_inputs: Any, weighting: Any) -> None:
    query, key, value = random_inputs()
    mask = torch.randn(7, 9, dtype=torch.float64).masked_fill(torch.rand(7, 9) < 0.3, -torch.inf).requires_grad_()
    output, log_normalizer = attention(query, key, value, weighting=weighting, attn_mask=mask)
    (gradient,) = torch.autograd.grad(output.square().sum() + log_normalizer.sum(), mask)
    assert gradient.isfinite().all()
    assert (gradient[mask == -torch.inf] == 0).all()
    assert (gradient != 0).any()


def test_empty_row_with_a_sink_reports_the_sink_and_sends_it_no_gradient(random_inputs: Any) -> None:
    query, key, value = random_inputs(3, 2)
    sinks = torch.tensor([0.5, 1.0, -3.0, 8.0], dtype=torch.float64, requires_grad=True)
    output, log_normalizer = attention(query, key, value, weighting=Softmax(), sinks=sinks, causal=True)
    assert (output[:, :, 0] == 0).all()
    torch.testing.assert_close(log_normalizer[:, :, 0], sinks.detach().expand(2, 4))
    (gradient,) = torch.autograd.grad(log_normalizer[:, :, 0].sum(), sinks, retain_graph=True)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(log_normalizer[:, :, 1].sum(), sinks)
    assert (gradient > 0).all()


@pytest.mark.parametrize("weighting", [LSSA(), LSSAR(3.0), Softmax(normalize_qk=True)], ids=["lssa", "lssar", "cosine"])
def test_vectors_below_the_norm_floor_are_divided_by_the_floor(random_inputs: Any, weighting: Any) -> None:
    query, key, value = random_inputs(4, 5, key_heads=4)
    query[:, :, 1] = 0
    key[:, :, 2] = 0
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output, log_normalizer = attention(*leaves, weighting=weighting)
    gradients = torch.autograd.grad(output.square().sum() + log_normalizer.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 1] == 0).all()
    assert (gradients[1][:, :, 2] == 0).all()
    # Divided by the floor, not by the norm: doubling a vector doubles the score.
    short = 1e-9 * torch.randn(1, 1, 1, 6, dtype=torch.float64)
    unit = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    unit[..., 0] = 1

    def normalizer(query: Tensor) -> Tensor:
        plain = Softplus(length_scale=False)
        return attention(query, unit, unit, weighting=plain, scale=1.0)[1]

    once, twice = (torch.expm1(normalizer(factor * short).exp()).log() for factor in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=0)
