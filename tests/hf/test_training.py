"""A training step through a swapped model: gradients as before the swap, with dropout of attention weights too."""

from __future__ import annotations

import pytest
import torch
from hf.families import families, output
from hf.oracle import oracle_of
from hf.redraw import assert_model_is_close
from tolerance import Comparison

import sightline as sl
from sightline.reference.dropout import dropout_keep


def gradients(model, inputs, real=None):
    """All gradients of a step as one vector: single ones may cancel to nothing, as that of the keys' bias does.

    real: (B, N), the outputs that the loss counts.
    """
    model.zero_grad()
    torch.manual_seed(5)
    result = output(model, **inputs)
    torch.manual_seed(6)
    loss = result * torch.randn(result.shape).to(result.dtype)
    (loss if real is None else loss[real]).sum().backward()
    found = [torch.zeros_like(weights) if weights.grad is None else weights.grad for weights in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def check_gradients(model, inputs, real=None):
    def compare(model):
        reference, eager = gradients(oracle_of(model), inputs, real), gradients(model, inputs, real)
        swapped = gradients(sl.swap_attention(model, sl.Softmax()), inputs, real)
        assert (eager - reference).norm() < 1e-4 * reference.norm()
        return Comparison(swapped, reference, eager)

    assert_model_is_close(model, compare, gradient=True)


@families()
def test_gradients(family):
    check_gradients(family.model().train(), family.inputs())


@families(without=("vit",))
def test_gradients_with_padding(family):
    inputs = family.inputs()
    masks, real = family.padding(inputs, "right")
    check_gradients(family.model().train(), {**inputs, **masks}, real)


@families("decoder")
def test_gradients_with_checkpointing(family):
    model, inputs = family.model().train(), {**family.inputs(), "use_cache": False}
    sl.swap_attention(model, sl.LSSAR(3))
    plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(model, inputs), plain, rtol=1e-4, atol=1e-5)


@pytest.fixture
def shared_dropout(monkeypatch):
    """torch's dropout decides as sightline's does, by the hash of a fresh seed, and about attention weights alone."""

    def dropout(weights, p=0.5, training=True, inplace=False):
        if not training or p == 0 or weights.dim() != 4:
            return weights
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
        batch, heads, rows, keys = weights.shape
        return weights * dropout_keep(seed, p, batch, heads, torch.arange(rows), keys) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


@families()
def test_dropout(family, shared_dropout):
    model, inputs = family.model(**{family.dropout: 0.3}), family.inputs()
    check_gradients(model.train(), inputs)
    with torch.no_grad():
        dropped, kept = output(model, **inputs), output(model.eval(), **inputs)
    assert not torch.allclose(dropped, kept, rtol=1e-2, atol=1e-2)
