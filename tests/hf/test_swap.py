"""swap_attention and restore_attention: what they change, what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hf.families import FAMILIES, families, output
from torch import nn

import sightline as sl
import sightline.hf
from sightline.hf._transformers import check

BY_NAME = {family.name: family for family in FAMILIES}


def state(model):
    """Everything of a model's configs that a swap may touch."""
    return [
        (config._attn_implementation, vars(config).get("sightline"), config.to_dict())
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    ]


def implementations(model):
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


@families()
def test_every_layer_is_swapped_and_restored(family):
    model = family.model()
    before = state(model)
    assert sl.swap_attention(model, sl.Softmax()) is model
    assert implementations(model) == {"sightline"}
    assert sl.restore_attention(model) is model
    assert state(model) == before


def test_a_model_that_has_run_is_restored_to_the_last_attribute():
    family = BY_NAME["llama"]
    model = sl.swap_attention(family.model(), sl.LSSA())
    model(**family.inputs())
    sl.restore_attention(model)
    assert not [name for module in model.modules() for name in vars(module) if "sightline" in name]


def test_some_layers_only():
    family = BY_NAME["llama"]
    model, inputs = family.model(), family.inputs()
    layers = [model.model.layers[index].self_attn for index in (0, 1)]
    seen = {}
    for index, module in enumerate(layers):
        module.register_forward_hook(lambda module, args, out, index=index: seen.__setitem__(index, out[0]))

    def run():
        with torch.no_grad():
            output(model, **inputs)
        return dict(seen)

    softmax = run()
    sl.swap_attention(model, sl.LSSA(), layers=[1])
    hybrid = run()
    sl.swap_attention(sl.restore_attention(model), sl.LSSA())
    every = run()
    torch.testing.assert_close(hybrid[0], softmax[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hybrid[1], softmax[1], rtol=1e-2, atol=1e-2)
    assert not torch.allclose(every[0], softmax[0], rtol=1e-2, atol=1e-2)


def test_layers_with_weightings_of_their_own():
    model = sl.swap_attention(BY_NAME["llama"].model(), {0: sl.LSSAR(3), 1: sl.LSSA()})
    with torch.no_grad():
        output(model, **BY_NAME["llama"].inputs())
    found = [layer.self_attn._sightline_weighting[-1] for layer in model.model.layers]
    assert found == [sl.LSSAR(3), sl.LSSA()]


def test_layers_are_counted_in_every_stack():
    model = sl.swap_attention(BY_NAME["t5"].model(), sl.LSSA(), layers=[1])
    with torch.no_grad():
        output(model, **BY_NAME["t5"].inputs())
    modules = [m for m in model.modules() if type(m).__name__ == "T5Attention"]
    assert len(modules) == 6
    for module in modules:
        assert module._sightline_weighting[-1] == (sl.LSSA() if module.layer_idx == 1 else sl.Softmax())


def test_part_of_a_model():
    model = BY_NAME["t5"].model()
    sl.swap_attention(model.encoder, sl.Softmax())
    assert model.encoder.config._attn_implementation == "sightline"
    assert model.decoder.config._attn_implementation == "eager"


def bart():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, **heads)
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize(("half", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_half_of_a_model_with_one_config_is_swapped_alone(half, other):
    model = bart()
    before = state(model)
    half, other = getattr(model.model, half), getattr(model.model, other)
    sl.swap_attention(half, sl.LSSA())
    assert implementations(half) == {"sightline"}
    assert implementations(other) == {"sdpa"}
    assert not hasattr(model.config, "sightline")
    sl.swap_attention(other, sl.Softmax())
    assert half.config.sightline["weighting"]["kind"] == "softplus"
    assert other.config.sightline["weighting"]["kind"] == "softmax"
    sl.restore_attention(half)
    assert implementations(other) == {"sightline"}
    sl.restore_attention(other)
    assert all(one in before for one in state(model))


@pytest.mark.parametrize("inner_first", [True, False])
def test_part_of_a_swapped_model_and_a_whole_with_a_swapped_part_are_refused(inner_first):
    model = BY_NAME["llama"].model()
    first, second = (model.model, model) if inner_first else (model, model.model)
    sl.swap_attention(first, sl.LSSA())
    with pytest.raises(ValueError, match="shares its config with one that is; restore_attention first"):
        sl.swap_attention(second, sl.Softmax())
    sl.restore_attention(first)
    assert implementations(model) == {"eager"}
    sl.restore_attention(sl.swap_attention(second, sl.Softmax()))


def test_second_model_of_one_config_is_refused():
    model = BY_NAME["llama"].model()
    twin = type(model)(model.config)
    sl.swap_attention(model, sl.LSSA())
    with pytest.raises(ValueError, match="shares its config with one that is"):
        sl.swap_attention(twin, sl.Softmax())


def test_config_of_a_model_that_is_gone_is_free():
    config = BY_NAME["llama"].config()
    for _ in range(2):
        model = transformers.LlamaForCausalLM(config)
        model.itself = [model]  # as hooks and wrappers do: only the collector of cycles finds it
        sl.swap_attention(model, sl.LSSA())
        del model


def test_statistics_asked_for_in_the_config_are_refused():
    model = BY_NAME["llama"].model()
    model.config.output_attentions = True
    before = state(model)
    with pytest.raises(ValueError, match=r"config.output_attentions to be False .* in the call"):
        sl.swap_attention(model, sl.Softmax())
    assert state(model) == before


def test_layers_may_be_numbers_of_numpy():
    model = sl.swap_attention(BY_NAME["llama"].model(), sl.LSSA(), layers=np.arange(1))
    assert list(model.config.sightline["layers"]) == ["0"]


def test_linear_attention_beside_the_interface_is_none_of_ours():
    model = BY_NAME["llama"].model()

    class FlashLinearAttention(nn.Linear):
        pass

    class CrossAttentionDecoderLayer(nn.Linear):
        pass

    model.model.mixer, model.model.last = FlashLinearAttention(2, 2), CrossAttentionDecoderLayer(2, 2)
    assert implementations(sl.swap_attention(model, sl.LSSA())) == {"sightline"}


def test_swap_after_choosing_the_implementation_by_name():
    model = BY_NAME["llama"].model()
    model.set_attn_implementation("sightline")
    sl.swap_attention(model, sl.LSSA())
    sl.restore_attention(model)
    assert implementations(model) == {"sightline"}
    assert not hasattr(model.config, "sightline")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied):
    model = BY_NAME["llama"].model()
    before = state(model)
    twin = copied(sl.swap_attention(model, sl.LSSA()))
    sl.restore_attention(twin)
    assert state(twin) == before
    assert implementations(model) == {"sightline"}


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))


def falcon():
    config = transformers.FalconConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_ln_in_parallel_attn=1
    )
    return transformers.FalconForCausalLM(config)


@pytest.mark.parametrize(("build", "module"), [(bloom, "BloomAttention"), (falcon, "FalconAttention")])
def test_models_outside_the_interface_are_refused(build, module):
    model = build()
    before = state(model)
    with pytest.raises(NotImplementedError, match=f"model: .*{type(model).__name__}.*computed in {module}"):
        sl.swap_attention(model, sl.Softmax())
    assert state(model) == before


def test_model_without_attention_is_refused():
    config = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)
    with pytest.raises(NotImplementedError, match=r"MambaModel .* no module that uses it"):
        sl.swap_attention(transformers.MambaModel(config), sl.Softmax())


def test_attention_module_added_beside_the_interface_is_refused():
    model = BY_NAME["llama"].model()
    model.pooling = nn.MultiheadAttention(8, 2)
    with pytest.raises(NotImplementedError, match="computed in MultiheadAttention"):
        sl.swap_attention(model, sl.Softmax())
    assert implementations(model) == {"eager"}


def test_model_that_keeps_its_attention_is_left_alone(monkeypatch):
    model = BY_NAME["t5"].model()
    before = state(model)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(NotImplementedError, match="T5Attention of T5ForConditionalGeneration kept its own attention"):
        sl.swap_attention(model, sl.Softmax())
    monkeypatch.undo()
    assert state(model) == before


@pytest.mark.parametrize(
    ("weighting", "layers", "error", "message"),
    [
        ("lssa", None, TypeError, "weighting: expected a Softmax, Softplus, LSSA.. or LSSAR.., got 'lssa'"),
        (sl.Reweight(), None, TypeError, "weighting: expected a Softmax"),
        ({0: "lssa"}, None, TypeError, "weighting: expected a Softmax, .* for layer 0, got 'lssa'"),
        ({"0": sl.LSSA()}, None, TypeError, "weighting: expected indices of layers, got '0'"),
        ({}, None, ValueError, "weighting: expected at least one layer, got none"),
        ({0: sl.LSSA()}, [0], ValueError, "layers: expected None where weighting maps"),
        (
            {7: sl.LSSA()},
            None,
            ValueError,
            "layers: expected indices of LlamaForCausalLM's attention layers, 0 to 1, got 7",
        ),
        (sl.LSSA(), [2], ValueError, "layers: expected indices of LlamaForCausalLM's attention layers, 0 to 1, got 2"),
        (sl.LSSA(), [-1], ValueError, "layers: expected indices .* 0 to 1, got -1"),
        (sl.LSSA(), [], ValueError, "layers: expected at least one layer, got none"),
        (sl.LSSA(), 1, TypeError, "layers: expected None or indices of layers, got 1"),
        (sl.LSSA(), "01", TypeError, "layers: expected None or indices of layers, got '01'"),
        (sl.LSSA(), [True], TypeError, "layers: expected indices of layers, got True"),
    ],
)
def test_wrong_arguments_are_refused(weighting, layers, error, message):
    model = BY_NAME["llama"].model()
    before = state(model)
    with pytest.raises(error, match=message):
        sl.swap_attention(model, weighting, layers)
    assert state(model) == before


def test_layers_without_an_index_cannot_be_told_apart():
    model = BY_NAME["vit"].model()
    with pytest.raises(
        NotImplementedError, match="layers: expected None for ViTModel, whose ViTAttention does not know"
    ):
        sl.swap_attention(model, sl.LSSA(), layers=[0])
    assert implementations(model) == {"eager"}


def test_reweighted_softmax_with_sinks_is_refused():
    model = BY_NAME["gpt_oss"].model()
    with pytest.raises(NotImplementedError, match=r"weighting: .* GptOssForCausalLM, whose attention has sinks"):
        sl.swap_attention(model, sl.Softmax(reweight=sl.Reweight()))
    assert implementations(model) == {"eager"}


def test_swapping_twice_is_refused():
    model = sl.swap_attention(BY_NAME["llama"].model(), sl.LSSA())
    with pytest.raises(ValueError, match="model: expected LlamaForCausalLM with its own attention"):
        sl.swap_attention(model, sl.Softmax())
    assert model.config.sightline["weighting"]["kind"] == "softplus"


def test_restoring_what_was_not_swapped_is_refused():
    with pytest.raises(ValueError, match="model: expected a LlamaForCausalLM that swap_attention swapped"):
        sl.restore_attention(BY_NAME["llama"].model())


@pytest.mark.parametrize("call", [lambda model: sl.swap_attention(model, sl.LSSA()), sl.restore_attention])
def test_a_wrapper_is_told_which_model_is_meant(call):
    wrapper = nn.ModuleDict({"base": BY_NAME["llama"].model()})
    with pytest.raises(TypeError, match=r"got ModuleDict; the one in it is its base$"):
        call(wrapper)


@pytest.mark.parametrize("call", [lambda model: sl.swap_attention(model, sl.LSSA()), sl.restore_attention])
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        call(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        (None, ModuleNotFoundError, r"transformers is missing: pip install sightline\[hf\]"),
        ("4.57.6", ImportError, "needs transformers 5.4 or newer, got 4.57.6"),
        ("5.3.0", ImportError, "needs transformers 5.4 or newer, got 5.3.0"),
    ],
)
def test_missing_or_old_transformers_is_named(version, error, message):
    with pytest.raises(error, match=message):
        check(version)


@pytest.mark.parametrize("version", ["5.4.0", "5.10.0.dev0", "6.0.0"])
def test_transformers_that_serve_are_taken(version):
    check(version)


def test_import_of_sightline_leaves_transformers_alone():
    code = """
import sys, sightline
assert "transformers" not in sys.modules and {"swap_attention", "hf", "models"} <= set(dir(sightline))
sightline.swap_attention
assert "transformers" in sys.modules
sightline.models.SightlineLlamaConfig
try:
    sightline.nothing
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "module 'sightline' has no attribute 'nothing'"
