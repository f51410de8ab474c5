"""LSSA and LSSAR inside models: n_i counts visible keys, whatever pads, packs, caches or hides them.

The reference is the formula in float64 under transformers' own dense masks (hf.oracle).
"""

from __future__ import annotations

import pytest
import torch
from hf.families import LENGTH, families, output
from hf.oracle import oracle_of
from hf.redraw import assert_model_is_close
from hf.test_exactness import as_bias, causal_mask_with_holes
from hf.test_generation import assert_same_generation, generate, prompts
from tolerance import Comparison
from transformers import DynamicCache, StaticCache

import sightline as sl

# Without the warnings of models whose softcap, sinks or scaling are replaced, which test_attention_function is about.
pytestmark = pytest.mark.filterwarnings("ignore:.* replaces the model's softmax")

weightings = pytest.mark.parametrize("weighting", [sl.LSSA(), sl.LSSAR(3)], ids=["lssa", "lssar"])


def check(model, inputs, weighting, real=None, given=None):
    """Compare a swapped model with its formulas, by the tolerance rule.

    given: what the swapped model gets, where that differs.
    """

    def compare(model):
        with torch.no_grad():
            actual = output(model, **(inputs if given is None else given))
            expected, made = output(oracle_of(model), **inputs), output(oracle_of(model).float(), **inputs)
        results = actual, expected, made
        return Comparison(*(results if real is None else (result[real] for result in results)))

    assert_model_is_close(model, compare, reweighted=weighting.reweight is not None)


@weightings
@families()
def test_as_the_formula(family, weighting):
    check(sl.swap_attention(family.model(), weighting), family.inputs(), weighting)


@weightings
@pytest.mark.parametrize("side", ["left", "right"])
@families(without=("vit",))
def test_padded_as_the_formula(family, side, weighting):
    inputs = family.inputs()
    masks, real = family.padding(inputs, side)
    check(sl.swap_attention(family.model(), weighting), {**inputs, **masks}, weighting, real)


@weightings
@families("decoder")
def test_mask_of_the_user_as_the_formula(family, weighting):
    visible = causal_mask_with_holes()
    inputs = family.inputs()
    model = sl.swap_attention(family.model(), weighting)
    check(model, {**inputs, "attention_mask": visible}, weighting)
    given = {**inputs, "attention_mask": as_bias(visible)}
    check(model, {**inputs, "attention_mask": visible}, weighting, given=given)


@weightings
@families("decoder")
def test_left_padding_changes_no_real_token(family, weighting):
    model, inputs = sl.swap_attention(family.model(), weighting), family.inputs()
    mask = family.padding(inputs, "left")[0]["attention_mask"]
    hidden = int((mask[0] == 0).sum())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = output(model, **inputs, attention_mask=mask, position_ids=positions)[0, hidden:]
        alone = output(model, input_ids=inputs["input_ids"][:1, hidden:])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def caches(model):
    return {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=LENGTH + 9),
    }


@weightings
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families("decoder")
def test_decoding_equals_prefill(family, cache, weighting):
    model, tokens = sl.swap_attention(family.model(), weighting), family.inputs()["input_ids"]
    past = caches(model)[cache]
    with torch.no_grad():
        whole = output(model, input_ids=tokens, use_cache=False)
        # A prompt, a block in the middle, then token by token.
        parts = [tokens[:, :7], tokens[:, 7:12], *tokens[:, 12:].split(1, dim=1)]
        decoded = torch.cat([output(model, input_ids=part, past_key_values=past) for part in parts], dim=1)
    torch.testing.assert_close(decoded, whole, rtol=1e-3, atol=1e-4)


@weightings
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families("decoder")
def test_decoding_a_padded_batch_equals_prefill(family, cache, weighting):
    model, inputs = sl.swap_attention(family.model(), weighting), family.inputs()
    masks, real = family.padding(inputs, "left")
    mask, tokens = masks["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = caches(model)[cache]
    decoded = []
    with torch.no_grad():
        whole = output(model, input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        for begin, end in ((0, 8), *((step, step + 1) for step in range(8, LENGTH))):
            part = {"input_ids": tokens[:, begin:end], "position_ids": positions[:, begin:end]}
            decoded.append(output(model, **part, attention_mask=mask[:, :end], past_key_values=past))
    torch.testing.assert_close(torch.cat(decoded, dim=1)[real], whole[real], rtol=1e-3, atol=1e-4)


@weightings
@families("decoder", "encoder-decoder")
def test_static_cache_generates_as_dynamic(family, weighting):
    model, inputs = sl.swap_attention(family.model(), weighting), prompts(family)
    assert_same_generation(generate(model, inputs, cache_implementation="static"), generate(model, inputs))
