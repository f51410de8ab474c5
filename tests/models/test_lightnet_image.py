"""LightNet for images: one scan over a grid of patches, on transformers' classes."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForImageClassification

from sightline.models import LightNetForImageClassification, LightNetImageConfig, LightNetImageModel

SIZES = {
    "image_size": (6, 8),
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 5,
    "initializer_range": 0.3,  # large enough for every part of a small model to count
}
VARIANTS = [(positions, pooling) for positions in (None, "lrpe", "tpe") for pooling in ("mean", "class")]


def build(**options):
    return LightNetForImageClassification(LightNetImageConfig(**{**SIZES, **options})).eval()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("positions", "pooling"), VARIANTS)
def test_loss_and_gradients_of_every_weight(positions, pooling):
    model, labels = build(position_encoding=positions, pooling=pooling), torch.tensor([0, 3])
    output = model(torch.randn(2, 3, 6, 8), labels=labels)
    assert output.logits.shape == (2, 5)
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("positions", "pooling"), VARIANTS)
def test_only_positions_tell_where_a_patch_is(positions, pooling):
    model, images = build(position_encoding=positions, pooling=pooling), torch.randn(2, 3, 6, 8)
    # The same patches, two of them (rows 0 and 1 of column 0) in each other's place.
    moved = images.clone()
    moved[..., :2, :2], moved[..., 2:4, :2] = images[..., 2:4, :2], images[..., :2, :2]
    difference = (model(images).logits - model(moved).logits).abs().max()
    assert difference < 1e-4 if positions is None else difference > 1e-3


def test_every_patch_sees_every_other():
    model, images = build(position_encoding=None).model, torch.randn(1, 3, 6, 8)
    changed = images.clone()
    changed[..., -2:, -2:] += 1
    difference = (model(images).last_hidden_state - model(changed).last_hidden_state).abs().amax(-1)
    assert (difference > 1e-5).all()


@pytest.mark.parametrize("positions", [None, "lrpe", "tpe"])
def test_images_of_another_size_are_read_too(positions):
    model = build(position_encoding=positions)
    assert model.model(torch.randn(1, 3, 10, 4)).last_hidden_state.shape == (1, 10, 32)


@pytest.mark.parametrize(("positions", "pooling"), VARIANTS)
def test_what_is_saved_is_loaded_by_the_auto_classes(tmp_path, positions, pooling):
    model, images = build(position_encoding=positions, pooling=pooling), torch.randn(2, 3, 6, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is LightNetForImageClassification
    assert torch.equal(loaded(images).logits, model(images).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LightNetImageModel
    assert torch.equal(base(images, return_dict=False)[1], model.model(images).pooler_output)


@pytest.mark.parametrize(("positions", "pooling"), VARIANTS)
def test_compiled_without_graph_breaks_it_gives_what_it_gives_eagerly(positions, pooling):
    model, images = build(position_encoding=positions, pooling=pooling), torch.randn(2, 3, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = (run(images, labels=torch.tensor([0, 3])) for run in (model, compiled))
    assert_same(actual.logits, expected.logits)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(run.loss, parameters) for run in (actual, expected)), strict=True):
        assert_same(one, other)


def assert_fresh(weights):
    """The classifier, the patches and the class token have the config's 0.05, MD-TPE what its module draws."""
    spreads = {
        "classifier.weight": (0.05, 0.05),
        "model.patch_embed.weight": (0.05, 0.05),
        "model.class_token": (0.05, 0.15),
        "model.positions.query": (0.5, 0.15),
        "model.positions.key": (0.5, 0.15),
    }
    for name, (std, tolerance) in spreads.items():
        assert weights[name].std().item() == pytest.approx(std, rel=tolerance), name
        assert abs(weights[name].mean().item()) < tolerance * std * 2, name
    for name in ("classifier.bias", "model.patch_embed.bias"):
        assert not weights[name].any(), name
    assert torch.equal(weights["model.positions.decay_logits"], torch.linspace(0, 4, 32))
    return [*spreads, "classifier.bias", "model.patch_embed.bias", "model.positions.decay_logits"]


def test_fresh_weights_and_those_missing_in_a_file_have_the_spread_of_the_config(tmp_path):
    sizes = {"hidden_size": 512, "num_attention_heads": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    options = {"position_encoding": "tpe", "pooling": "class", "initializer_range": 0.05, "num_labels": 20}
    model = build(**sizes, **options)
    weights = model.state_dict()
    missing = assert_fresh(weights)
    kept = {name: tensor for name, tensor in weights.items() if name not in missing}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = LightNetForImageClassification.from_pretrained(tmp_path).state_dict()
    assert_fresh(loaded)
    assert not torch.equal(loaded["model.class_token"], weights["model.class_token"])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def test_gradient_checkpointing_changes_no_gradient():
    model, images = build().train(), torch.randn(2, 3, 6, 8)
    model(images, labels=torch.tensor([1, 2])).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model(images, labels=torch.tensor([1, 2])).loss.backward()
    assert len(calls) == 2
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 6, 8), "pixel_values: expected shape (B, 3, height, width), got (3, 6, 8)"),
        ((1, 1, 6, 8), "pixel_values: expected shape (B, 3, height, width), got (1, 1, 6, 8)"),
        ((1, 3, 0, 8), "pixel_values: expected height and width to be multiples of the patch size (2, 2), got (0, 8)"),
        ((1, 3, 7, 8), "pixel_values: expected height and width to be multiples of the patch size (2, 2), got (7, 8)"),
    ],
)
def test_bad_images_are_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(torch.randn(*shape))


def test_what_an_image_model_does_not_have_is_refused_by_name():
    with pytest.raises(TypeError, match=r"^pixel_values: expected a tensor, got NoneType"):
        build()(None)
    with pytest.raises(ValueError, match=r"^output_attentions: expected False"):
        build()(torch.randn(1, 3, 6, 8), output_attentions=True)


def test_patches_are_the_input_embeddings():
    model = build()
    assert model.get_input_embeddings() is model.model.patch_embed
    model.enable_input_require_grads()
    model.requires_grad_(False)
    assert model(torch.randn(1, 3, 6, 8)).logits.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, "patch_size: expected a divisor of image_size = (6, 8), got (4, 4)"),
        ({"image_size": (1, 2, 3)}, "image_size: expected a number of pixels or a pair of them, got (1, 2, 3)"),
        ({"pooling": "max"}, "pooling: expected 'mean' or 'class', got 'max'"),
        ({"position_encoding": "rope"}, "position_encoding: expected None, 'lrpe' or 'tpe', got 'rope'"),
    ],
)
def test_bad_configs_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LightNetImageConfig(**{**SIZES, **options})
