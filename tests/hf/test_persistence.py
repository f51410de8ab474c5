"""What is saved comes back: the weighting in the config, and model types that fail loudly without sightline."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hf.families import FAMILIES, families, output
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import sightline as sl
from sightline.hf import read_settings, write_settings

pytestmark = pytest.mark.filterwarnings("ignore:.* replaces the model's softmax")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@families()
def test_weighting_is_saved_and_reloaded(family, tmp_path):
    model, inputs = sl.swap_attention(family.model(), sl.LSSAR(3)), family.inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sightline")
    with torch.no_grad():
        assert torch.equal(output(loaded, **inputs), output(model, **inputs))
    assert loaded.config.sightline == write_settings(sl.LSSAR(3))


def test_layers_are_saved_and_reloaded(tmp_path):
    family = FAMILIES[0]
    model, inputs = sl.swap_attention(family.model(), {1: sl.LSSA()}), family.inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sightline")
    with torch.no_grad():
        assert torch.equal(output(loaded, **inputs), output(model, **inputs))


def test_name_alone_is_softmax():
    family = FAMILIES[0]
    model, inputs = family.model(), family.inputs()
    with torch.no_grad():
        eager = output(model, **inputs)
        model.set_attn_implementation("sightline")
        torch.testing.assert_close(output(model, **inputs), eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"version": 2, "weighting": {"kind": "softmax"}},
            ValueError,
            "expected version 1, got 2, of a newer sightline",
        ),
        ({"weighting": {"kind": "softmax"}}, ValueError, "expected version 1, got None"),
        ({"version": True, "weighting": {"kind": "softmax"}}, ValueError, "expected version 1, got True"),
        ({"version": 1}, TypeError, "weighting: expected a mapping as to_dict gives it, got None"),
        ({"version": 1, "weighting": {"kind": "sigmoid"}}, ValueError, "weighting: expected kind to be one of"),
        (
            {"version": 1, "weighting": {"kind": "softmax", "tilt": 1}},
            ValueError,
            "weighting: expected the options .*, got 'tilt'",
        ),
        (
            {"version": 1, "weighting": {"kind": "softmax"}, "heads": 1},
            ValueError,
            "expected version, weighting and layers, got 'heads'",
        ),
        ({"version": 1, "weighting": {"kind": "softmax"}, "layers": [1]}, TypeError, "expected layers to be a mapping"),
        ("softplus", TypeError, "expected a mapping with version and weighting, got 'softplus'"),
    ],
)
def test_wrong_settings_are_named(settings, error, message):
    model = FAMILIES[0].model()
    model.set_attn_implementation("sightline")
    model.config.sightline = settings
    with pytest.raises(error, match=f"config.sightline: {message}"):
        output(model, **FAMILIES[0].inputs())


def test_settings_are_json():
    weightings = {0: sl.LSSAR(3), 4: sl.Softmax(softcap=5.0)}
    settings = json.loads(json.dumps(write_settings(sl.LSSA(), weightings)))
    assert [read_settings(settings, index) for index in (0, 1, 4, None)] == [
        sl.LSSAR(3),
        sl.LSSA(),
        sl.Softmax(softcap=5.0),
        sl.LSSA(),
    ]


def model_of_our_own(weighting):
    config = sl.models.SightlineLlamaConfig(**SIZES, sightline=write_settings(weighting))
    return AutoModelForCausalLM.from_config(config).eval()


def test_model_type_of_our_own_reloads_to_equal_logits(tmp_path):
    model, tokens = model_of_our_own(sl.LSSAR(3)), torch.randint(0, 50, (2, 17))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is sl.models.SightlineLlamaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is sl.models.SightlineLlamaModel
    assert AutoConfig.from_pretrained(tmp_path).sightline == write_settings(sl.LSSAR(3))
    with torch.no_grad():
        assert torch.equal(output(loaded, input_ids=tokens), output(model, input_ids=tokens))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attn_implementation"] == "sightline"


def test_model_type_of_our_own_computes_with_its_weighting():
    model, tokens = model_of_our_own(sl.LSSA()), torch.randint(0, 50, (2, 17))
    plain = LlamaForCausalLM(LlamaForCausalLM.config_class(**SIZES)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = output(sl.swap_attention(plain, sl.LSSA()), input_ids=tokens)
        assert torch.equal(output(model, input_ids=tokens), expected)
    assert sl.models.SightlineLlamaConfig().sightline == write_settings(sl.LSSA())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_type_of_our_own_refuses_other_attention(tmp_path, implementation):
    model = model_of_our_own(sl.LSSA())
    model.save_pretrained(tmp_path)
    message = f"attn_implementation: expected 'sightline' for SightlineLlama.*, got '{implementation}'"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)


def test_model_type_of_our_own_refuses_wrong_settings():
    with pytest.raises(ValueError, match=r"config\.sightline: expected version 1, got 9"):
        sl.models.SightlineLlamaConfig(sightline={"version": 9})


def test_model_type_of_our_own_fails_loudly_without_sightline(tmp_path):
    model_of_our_own(sl.LSSA()).save_pretrained(tmp_path)
    code = f"""
from transformers import AutoModelForCausalLM, LlamaForCausalLM

for loader in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        loader.from_pretrained({str(tmp_path)!r})
    except ValueError as error:
        print(loader.__name__, str(error).replace("\\n", " "))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for loader, line in zip(("AutoModelForCausalLM", "LlamaForCausalLM"), result.stdout.splitlines(), strict=True):
        assert line.startswith(loader)
        assert "sightline" in line
