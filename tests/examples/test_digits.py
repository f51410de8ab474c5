"""The baseline of examples/digits.py is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import required
import torch


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    required.module("sklearn")
    import digits

    yield digits
    for name in ("digits", "common"):
        sys.modules.pop(name, None)


def test_the_scan_with_a_multiplicative_decay_is_its_recurrence(digits):
    query, weight, gain = torch.randn(3, 2, 3, 41, 6, dtype=torch.float64)
    log_decay = -4 * torch.rand(2, 3, 41, 6, dtype=torch.float64)
    value = torch.randn(2, 3, 41, 5, dtype=torch.float64)
    state, expected = torch.zeros(2, 3, 6, 5, dtype=torch.float64), []
    for t in range(41):
        state = log_decay[:, :, t].exp()[..., None] * state
        state = state + (weight * gain)[:, :, t, :, None] * value[:, :, t, None, :]
        expected.append((query[:, :, t, None, :] @ state).squeeze(2))
    torch.testing.assert_close(digits.decayed_scan(query, weight, value, log_decay, gain), torch.stack(expected, 2))


def test_both_models_have_the_same_parameters_and_learn(digits):
    one, two = digits.build(False, 0), digits.build(True, 0)
    assert one.num_parameters() == two.num_parameters()
    images = torch.randn(2, 1, 8, 8)
    assert (one(images).logits - two(images).logits).abs().max() > 1e-4
    two(images, labels=torch.tensor([1, 2])).loss.backward()
    for name, parameter in two.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
