"""With Softmax in place a model gives the numbers that it gave before, family by family (docs/transformers.md)."""

from __future__ import annotations

import pytest
import torch
from hf.families import BATCH, LENGTH, families, output
from hf.oracle import oracle_of
from hf.redraw import assert_model_is_close
from tolerance import Comparison

import sightline as sl


def check_against_eager(model, inputs, *, real=None, swapped_inputs=None):
    """Swap the model and compare its output with that of its eager attention, by the tolerance rule.

    real: (B, N), the outputs that count; what an eager model makes of padding tokens is arbitrary.
    """

    def compare(model):
        with torch.no_grad():
            reference = output(oracle_of(model), **inputs)
            eager = output(model, **inputs)
            swapped = output(sl.swap_attention(model, sl.Softmax()), **(swapped_inputs or inputs))
        results = (swapped, reference, eager) if real is None else (swapped[real], reference[real], eager[real])
        torch.testing.assert_close(results[2].double(), results[1], rtol=1e-4, atol=1e-4)
        return Comparison(*results)

    assert_model_is_close(model, compare)


def causal_mask_with_holes(length=LENGTH):
    """(B, 1, N, N) bool: no later key, and a third of the earlier ones hidden, but never a row's own."""
    visible = torch.rand(BATCH, 1, length, length) > 0.3
    return visible.tril() | torch.eye(length, dtype=torch.bool)


def as_bias(visible, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@families()
def test_unpadded(family):
    check_against_eager(family.model(), family.inputs())


@families(without=("gemma2", "gpt_oss"))  # sdpa has neither softcap nor sinks
def test_unpadded_as_sdpa(family):
    model, inputs = family.model("sdpa"), family.inputs()
    with torch.no_grad():
        before = output(model, **inputs)
        after = output(sl.swap_attention(model, sl.Softmax()), **inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@families(without=("vit",))  # images have no padding
def test_padded(family, side):
    inputs = family.inputs()
    masks, real = family.padding(inputs, side)
    check_against_eager(family.model(), {**inputs, **masks}, real=real)


@pytest.mark.parametrize("form", ["bool", "float"])
@families()
def test_mask_of_the_user(family, form):
    # ViT's 16 patches and its class token; models of two stacks take the mask for their decoder.
    inputs, visible = family.inputs(), causal_mask_with_holes(17 if family.name == "vit" else LENGTH)
    name = "decoder_attention_mask" if family.kind == "encoder-decoder" else "attention_mask"
    mask = visible if form == "bool" else as_bias(visible)
    check_against_eager(family.model(), {**inputs, name: as_bias(visible)}, swapped_inputs={**inputs, name: mask})


@families("decoder", without=("gemma2",))  # which caps scores before a bias
def test_finite_bias_of_the_user(family):
    bias = as_bias(causal_mask_with_holes())
    mask = torch.where(bias == 0, torch.randn_like(bias), bias)
    check_against_eager(family.model(), {**family.inputs(), "attention_mask": mask})


@families("decoder", packed=True)
def test_packed_position_ids(family):
    positions = torch.stack([torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]), torch.arange(LENGTH)])
    check_against_eager(family.model(), {**family.inputs(), "position_ids": positions, "use_cache": False})


@families("decoder")
def test_packed_offsets(family):
    model, tokens = family.model(), family.inputs()["input_ids"][:1]
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    offsets = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 12, "max_length_k": 12}

    def compare(model):
        with torch.no_grad():
            reference, eager = (
                torch.cat(
                    [output(alone, input_ids=document) for document in tokens.split([9, LENGTH - 9], dim=1)], dim=1
                )
                for alone in (oracle_of(model), model)
            )
            sl.swap_attention(model, sl.Softmax())
            swapped = output(model, input_ids=tokens, position_ids=positions, use_cache=False, **lengths)
        return Comparison(swapped, reference, eager)

    assert_model_is_close(model, compare)


@families(without=("gpt_oss", "llama4"))  # whose experts are chosen differently where rounding differs
def test_bfloat16_is_as_exact_as_eager(family):
    model, inputs = family.model().bfloat16(), family.inputs()
    with torch.no_grad():
        reference = output(oracle_of(model), **inputs)
        eager = output(model, **inputs).double()
        swapped = output(sl.swap_attention(model, sl.Softmax()), **inputs).double()
    assert (swapped - reference).norm() < 1.5 * (eager - reference).norm()


@families("decoder", "encoder", without=("gpt_oss", "llama4"))
def test_autocast_is_as_exact_as_eager(family):
    model, inputs = family.model(), family.inputs()
    with torch.no_grad():
        reference = output(oracle_of(model), **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            eager = output(model, **inputs).double()
            swapped = output(sl.swap_attention(model, sl.Softmax()), **inputs).double()
    assert (swapped - reference).norm() < 1.5 * (eager - reference).norm()


@families()
def test_second_model_of_another_weighting(family):
    inputs = family.inputs()
    first, second = family.model(), family.model()
    with torch.no_grad():
        eager = output(first, **inputs)
        sl.swap_attention(first, sl.Softmax())
        sl.swap_attention(second, sl.Softplus(length_scale=False))
        before = output(second, **inputs)
        softmax = output(first, **inputs)
        after = output(second, **inputs)
        own_softmax = output(sl.swap_attention(sl.restore_attention(second), sl.Softmax()), **inputs)
    torch.testing.assert_close(softmax, eager, rtol=1e-4, atol=1e-4)
    assert torch.equal(before, after)
    assert not torch.allclose(after, own_softmax, rtol=1e-2, atol=1e-2)
