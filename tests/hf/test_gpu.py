"""A model of transformers on a GPU: swapped it computes what it did before, prefill, padding, cache and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import sightline as sl

pytestmark = pytest.mark.gpu

SIZES = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A Llama and its swapped copy, both on the GPU in float32."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval().cuda()
    return model, sl.swap_attention(copy.deepcopy(model), sl.Softmax())


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two prompts, one padded on the left."""
    mask = torch.ones(2, 150, dtype=torch.long, device="cuda")
    mask[1, :37] = 0
    return {"input_ids": torch.randint(128, (2, 150), device="cuda"), "attention_mask": mask}


def test_logits_and_gradients_are_those_of_before(models, inputs):
    seen = inputs["attention_mask"].bool()
    for name in ("logits", "gradient"):
        results = []
        for model in models:
            logits = model(**inputs).logits[seen]
            if name == "gradient":
                parameter = model.model.layers[0].self_attn.k_proj.weight
                (gradient,) = torch.autograd.grad(logits.square().mean(), parameter)
                results.append(gradient)
            else:
                results.append(logits)
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3 * float(results[0].abs().max()))


def test_generation_is_that_of_before(models, inputs):
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, actual = (model.generate(**inputs, **options) for model in models)
    torch.testing.assert_close(actual.logits[0], expected.logits[0], rtol=1e-3, atol=1e-3)
    # From a near tie on, two sequences may differ.
    same = (actual.sequences == expected.sequences).all(1)
    torch.testing.assert_close(actual.logits[-1][same], expected.logits[-1][same], rtol=1e-3, atol=1e-3)
    assert len(actual.logits) == options["max_new_tokens"]
