from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sightline.reference import attention, attention_weights, dropout_keep
from sightline.weighting import LSSA, LSSAR, Softmax


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poisoned", ["query", "key", "value"])
def test_non_finite_input_stays_in_the_rows_that_see_it(
    random_inputs: Any, weighting: Any, poison: float, poisoned: str
) -> None:
    inputs = dict(zip(("query", "key", "value"), random_inputs(6, 6, heads=2, key_heads=2), strict=True))
    clean = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    inputs[poisoned][:, :, 4, 1] = poison
    dirty = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    options = {"weighting": weighting, "causal": True}
    expected, expected_normalizer = attention(**clean, **options)
    output, normalizer = attention(**dirty, **options)
    # Row 4 and, unless only the query is poisoned, row 5 see index 4.
    untouched = [0, 1, 2, 3, 5] if poisoned == "query" else [0, 1, 2, 3]
    assert torch.equal(output[:, :, untouched], expected[:, :, untouched])
    assert torch.equal(normalizer[:, :, untouched], expected_normalizer[:, :, untouched])
    # The whole loss, poisoned rows included: their gradient may not reach what they cannot see either.
    gradients = torch.autograd.grad(output.sum() + normalizer.sum(), list(dirty.values()))
    expected_gradients = torch.autograd.grad(expected.sum() + expected_normalizer.sum(), list(clean.values()))
    torch.testing.assert_close(gradients[0][:, :, untouched], expected_gradients[0][:, :, untouched])
    if poisoned == "query":
        # Row 4, the poisoned one, sees every key but the last, whose gradient comes from row 5 alone.
        torch.testing.assert_close(gradients[1][:, :, 5], expected_gradients[1][:, :, 5])
        torch.testing.assert_close(gradients[2][:, :, 5], expected_gradients[2][:, :, 5])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_value_reaches_every_row_that_gives_it_weight(random_inputs: Any, poison: float) -> None:
    query, key, value = random_inputs(6, 6)
    value[:, :, 4, 1] = poison
    output, _ = attention(query, key, value, weighting=Softmax(), causal=True)
    expected = torch.full((2, 4, 2), poison, dtype=torch.float64)
    torch.testing.assert_close(output[:, :, 4:, 1], expected, equal_nan=True)
    assert output[..., 0].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_nothing_sees_may_hold_anything_and_has_no_gradient(
    random_inputs: Any, weighting: Any, poison: float
) -> None:
    inputs = dict(zip(("query", "key", "value"), random_inputs(6, 6, heads=2, key_heads=2), strict=True))
    clean = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    # The last two keys are hidden, and the first two rows, two positions before all keys, see none.
    options = {"weighting": weighting, "causal": True, "key_lengths": torch.tensor([4, 4])}
    for name, hidden in {"query": [0, 1], "key": [4, 5], "value": [4, 5]}.items():
        inputs[name][:, :, hidden] = poison
    dirty = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    gradients = []
    for leaves in (clean, dirty):
        output, normalizer = attention(**leaves, **options)
        assert (output[:, :, :2] == 0).all()
        gradients.append(torch.autograd.grad(output.sum() + normalizer[:, :, 2:].sum(), list(leaves.values())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert (gradients[1][0][:, :, :2] == 0).all()
    assert (gradients[1][1][:, :, 4:] == 0).all()


def test_infinite_values_of_both_signs_give_nan(random_inputs: Any) -> None:
    query, key, value = random_inputs(1, 3)
    value[:, :, 0], value[:, :, 1] = math.inf, -math.inf
    output, _ = attention(query, key, value, weighting=Softmax())
    assert output.isnan().all()


def test_key_of_zero_weight_does_not_spoil_the_gradient_with_its_value(random_inputs: Any) -> None:
    query, key, value = random_inputs(1, 12)
    key[:, :, 5] = -query[:, ::2, 0]
    query[:, 1::2] = query[:, ::2]
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    weights, _ = attention_weights(query, key, weighting=LSSAR())
    ignored = (weights == 0).all(dim=(0, 1, 2))
    assert ignored.any()
    poisoned = value.masked_fill(ignored.view(-1, 1), math.nan).requires_grad_()
    expected, _ = attention(*leaves, weighting=LSSAR())
    output, _ = attention(*leaves[:2], poisoned, weighting=LSSAR())
    assert torch.equal(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), leaves[:2]), torch.autograd.grad(expected.sum(), leaves[:2])
    )


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1, -7])
def test_dropout_hash_equals_its_definition_in_whole_numbers(seed: int) -> None:
    rows, keys, probability = torch.tensor([0, 5, 2]), 9, 0.37
    keep = dropout_keep(torch.tensor([seed]), probability, 2, 3, rows, keys, "cpu")
    stream = lowbias32((lowbias32(seed % 2**32) + (seed >> 32) % 2**32) % 2**32)
    for b in range(2):
        for h in range(3):
            for r, i in enumerate(rows.tolist()):
                row = lowbias32((lowbias32((stream + b * 3 + h) % 2**32) + i) % 2**32)
                bits = [lowbias32(row ^ lowbias32((j + 0x9E3779B9) % 2**32)) for j in range(keys)]
                assert keep[b, h, r].tolist() == [x >= math.floor(probability * 2**32) for x in bits]


def test_dropout_drops_weights_and_scales_what_it_keeps(random_inputs: Any) -> None:
    query, key, value = random_inputs(50, 60)
    seed = torch.tensor([3])
    weights, log_normalizer = attention_weights(query, key, weighting=LSSA())
    output, dropped_normalizer = attention(query, key, value, weighting=LSSA(), dropout_p=0.25, dropout_seed=seed)
    keep = dropout_keep(seed, 0.25, 2, 4, torch.arange(50), 60)
    assert 0.72 < keep.double().mean() < 0.78
    expected = (weights * keep / 0.75) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected)
    assert torch.equal(log_normalizer, dropped_normalizer)


def test_dropout_without_a_seed_is_refused(random_inputs: Any) -> None:
    with pytest.raises(ValueError, match="dropout_seed"):
        attention(*random_inputs(), weighting=Softmax(), dropout_p=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_give_their_own_dtype_close_to_float64(
    random_inputs: Any, weighting: Any, dtype: torch.dtype
) -> None:
    rounded = [tensor.to(dtype) for tensor in random_inputs(20, 30)]
    output, log_normalizer = attention(*rounded, weighting=weighting, causal=True)
    expected, _ = attention(*(tensor.double() for tensor in rounded), weighting=weighting, causal=True)
    assert output.dtype == dtype
    assert log_normalizer.dtype == torch.float32
    # Re-weighting multiplies the rounding of the scores by its power.
    bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.2}[dtype]
    assert (output.double() - expected).norm() <= bound * expected.norm()


def test_what_is_only_pretended_or_traced_is_not_read() -> None:
    with FakeTensorMode():
        tensors = [torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        attention(*tensors, weighting=Softmax())[0].sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in tensors)
    first, second = torch.randn(2, 3, 1, 2, 4, 8, dtype=torch.float64)
    second[2, ..., 1, :] = math.inf
    graph = make_fx(lambda *tensors: attention(*tensors, weighting=Softmax())[0])(*first)
    for tensors in (first, second):
        torch.testing.assert_close(graph(*tensors), attention(*tensors, weighting=Softmax())[0], equal_nan=True)
