"""Greedy generate() of a swapped model, in every way of caching, gives the tokens of the model before the swap."""

from __future__ import annotations

import copy

import pytest
import torch
from hf.families import families
from transformers import GenerationMixin

import sightline as sl

NEW_TOKENS = 8
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def generate(model, inputs, **options):
    # Whisper's own generate() is about audio: windows, timestamps, languages.
    return GenerationMixin.generate(model, **inputs, **{**GREEDY, **options})


def prompts(family, batch=2):
    inputs = {name: value[:batch] for name, value in family.inputs(length=13).items()}
    if family.kind == "decoder" and batch > 1:
        masks, _ = family.padding(inputs, "left")
        return {**inputs, **masks}
    if family.name == "t5":
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, -4:] = 0
        return {**inputs, "attention_mask": mask}
    return inputs


def assert_same_generation(actual, expected):
    """The same logits, step by step; once a near tie was decided differently a sequence has nothing to compare."""
    compared = torch.ones(expected.sequences.shape[0], dtype=torch.bool)
    steps = len(expected.logits)
    assert len(actual.logits) == steps
    for step in range(steps):
        torch.testing.assert_close(actual.logits[step][compared], expected.logits[step][compared], rtol=1e-3, atol=1e-3)
        column = step - steps
        compared &= actual.sequences[:, column] == expected.sequences[:, column]


def check_generation(family, inputs, *, before=None, **options):
    model = family.model()
    expected = generate(model, inputs, **(options if before is None else before))
    assert_same_generation(generate(sl.swap_attention(model, sl.Softmax()), inputs, **options), expected)


@families("decoder", "encoder-decoder")
def test_dynamic_cache(family):
    check_generation(family, prompts(family))


@families("decoder", "encoder-decoder")
def test_static_cache(family):
    check_generation(family, prompts(family), cache_implementation="static")


@families("decoder")
def test_static_cache_longer_than_the_prompt_and_answer(family):
    options = {"cache_implementation": "static", "max_new_tokens": 4, "cache_config": {"max_cache_len": 40}}
    check_generation(family, prompts(family), **options)


@families("decoder")
def test_static_cache_as_dynamic(family):
    model, inputs = family.model(), prompts(family)
    sl.swap_attention(model, sl.Softmax())
    dynamic = generate(model, inputs)
    assert_same_generation(generate(model, inputs, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@families("decoder")
def test_chunked_prefill(family, cache):
    options = {"prefill_chunk_size": 5, "cache_implementation": None if cache == "dynamic" else cache}
    check_generation(family, prompts(family), before={}, **options)


@families("decoder", "encoder-decoder")
def test_beam_search(family):
    model, inputs = family.model(), prompts(family)
    beams = {"num_beams": 3, "output_scores": True, "output_logits": False}
    expected = generate(model, inputs, **beams)
    actual = generate(sl.swap_attention(model, sl.Softmax()), inputs, **beams)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-3, atol=1e-4)
    same = (actual.sequences == expected.sequences).all(dim=1)
    # Beams whose scores tie may be told apart by rounding, all others not.
    assert same.any() or torch.allclose(actual.sequences_scores, expected.sequences_scores, rtol=1e-6)


@families("decoder", "encoder-decoder")
def test_assisted_decoding(family):
    model, assistant, inputs = family.model(), family.model(), prompts(family, batch=1)
    # Close to the model, so that some of its candidates are accepted and others not.
    with torch.no_grad():
        for own, drafted in zip(model.parameters(), assistant.parameters(), strict=True):
            drafted.copy_(own + 0.05 * drafted)
    expected = generate(model, inputs)
    sl.swap_attention(model, sl.Softmax())
    sl.swap_attention(assistant, sl.Softmax())
    actual = generate(model, inputs, assistant_model=assistant)
    assert_same_generation(actual, expected)


@families("decoder")
def test_deep_copies_generate_the_same(family):
    model, inputs = sl.swap_attention(family.model(), sl.LSSA()), prompts(family)
    assert_same_generation(generate(copy.deepcopy(model), inputs), generate(model, inputs))
