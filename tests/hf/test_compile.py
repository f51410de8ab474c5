"""A swapped model under torch.compile, in one graph: the same numbers, in training, prefill and decoding."""

from __future__ import annotations

import pytest
import torch
from hf.families import FAMILIES, families, output
from hf.test_training import gradients
from transformers import StaticCache

import sightline as sl

COMPILED = ("llama", "gemma2", "t5")
OTHERS = tuple(family.name for family in FAMILIES if family.name not in COMPILED)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


@families()
def test_forward(family):
    model, inputs = sl.swap_attention(family.model(), sl.Softmax()), family.inputs()
    with torch.no_grad():
        expected = output(model, **inputs)
        actual = output(compiled(model, backend="eager"), **inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@families(without=OTHERS)
def test_padded_forward_of_another_weighting(family):
    model, inputs = sl.swap_attention(family.model(), sl.LSSAR()), family.inputs()
    masks, real = family.padding(inputs, "left")
    with torch.no_grad():
        expected = output(model, **inputs, **masks)[real]
        actual = output(compiled(model), **inputs, **masks)[real]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@families(without=OTHERS)
def test_training_step(family):
    model, inputs = sl.swap_attention(family.model().train(), sl.Softmax()), family.inputs()
    expected = gradients(model, inputs)
    torch.testing.assert_close(gradients(compiled(model), inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighting", [sl.Softmax(softcap=3.0), sl.LSSAR()], ids=["softmax", "lssar"])
def test_weighting_that_a_loaded_model_brings(tmp_path, weighting):
    family = FAMILIES[0]
    inputs = family.inputs()
    model = sl.swap_attention(family.model(), {1: weighting})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sightline").eval()
    with torch.no_grad():
        # Its first call is the compiler's: nothing has read config.sightline before.
        actual = output(compiled(loaded), **inputs)
        torch.testing.assert_close(actual, output(model, **inputs), rtol=1e-4, atol=1e-4)


@families("decoder", without=OTHERS)
def test_decoding_with_a_static_cache_does_not_recompile(family):
    model = sl.swap_attention(family.model(), sl.Softmax())
    tokens = family.inputs()["input_ids"]
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = output(model, input_ids=tokens)
        cache = StaticCache(config=model.config, max_cache_len=32)
        output(model, input_ids=tokens[:, :12], past_key_values=cache)
        step = compiled(model, backend=count)
        for position in range(12, tokens.shape[1]):
            arguments = model.prepare_inputs_for_generation(
                tokens[:, : position + 1],
                next_sequence_length=1,
                past_key_values=cache,
                attention_mask=torch.ones(2, position + 1, dtype=torch.long),
            )
            actual = output(step, **arguments)
            torch.testing.assert_close(actual[:, -1], expected[:, position], rtol=1e-4, atol=1e-4)
            if position == 13:
                first = len(compilations)
    # transformers counts a sliding cache's tokens in a number, and compiles again for each until the window is full.
    if family.name == "llama":
        assert len(compilations) == first


def test_export_with_lengths_that_vary():
    family = FAMILIES[0]
    model = sl.swap_attention(family.model(), sl.LSSAR())
    length = torch.export.Dim("length", min=4, max=64)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return output(self.model, input_ids=tokens, attention_mask=mask, use_cache=False)

    def batch(tokens):
        inputs = family.inputs(length=tokens)
        masks, real = family.padding(inputs, "left")
        return (inputs["input_ids"], masks["attention_mask"]), real

    with torch.no_grad():
        exported = torch.export.export(Logits(), batch(21)[0], dynamic_shapes=({1: length}, {1: length})).module()
        for tokens in (21, 33):
            arguments, real = batch(tokens)
            torch.testing.assert_close(exported(*arguments)[real], Logits()(*arguments)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor():
    model = sl.swap_attention(FAMILIES[0].model(), sl.LSSA())
    inputs = FAMILIES[0].inputs()
    with torch.no_grad():
        actual = output(compiled(model, backend="inductor"), **inputs)
        torch.testing.assert_close(actual, output(model, **inputs), rtol=1e-4, atol=1e-4)
