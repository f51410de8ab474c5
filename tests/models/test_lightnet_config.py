"""Sizes and options of LightNet's configs are refused by their own names as soon as the config is built."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from sightline.models import LightNetConfig, LightNetForCausalLM, LightNetImageConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OWN_SIZES = {LightNetConfig: {"vocab_size": 50}, LightNetImageConfig: {"image_size": 8, "patch_size": 2}}
WHOLE_NUMBER = "expected a whole number of at least 1, got"
PIXELS = "expected a number of pixels or a pair of them, got"


def refuse(config: Any, error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        config(**{**SIZES, **OWN_SIZES[config], **options})


COUNTS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "key_dim",
    "gate_rank",
    "intermediate_size",
]
OWNERS = [
    *((config, name) for config in OWN_SIZES for name in COUNTS),
    (LightNetConfig, "vocab_size"),
    (LightNetImageConfig, "num_channels"),
]


@pytest.mark.parametrize(("config", "name"), OWNERS)
@pytest.mark.parametrize("size", [0, -3])
def test_sizes_are_at_least_one(config: Any, name: str, size: int) -> None:
    refuse(config, ValueError, {name: size}, f"{name}: {WHOLE_NUMBER} {size}")


@pytest.mark.parametrize(("config", "name"), OWNERS)
@pytest.mark.parametrize("size", ["4", 4.0, True], ids=repr)
def test_sizes_are_whole_numbers(config: Any, name: str, size: Any) -> None:
    refuse(config, TypeError, {name: size}, f"{name}: {WHOLE_NUMBER} {type(size).__name__}")


@pytest.mark.parametrize("config", OWN_SIZES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 513, "position_encoding": None}, "key_dim: expected at most 512, got 513"),
        ({"key_dim": 257}, "key_dim: expected at most 256, for position_encoding 'lrpe' doubles it, got 257"),
        (
            {"hidden_size": 600, "num_attention_heads": 2},
            "key_dim: expected at most 256, for position_encoding 'lrpe' doubles it, got 300, that of a value",
        ),
        (
            {"hidden_size": 1200, "num_attention_heads": 1, "key_dim": 8},
            "hidden_size: expected at most 512 for each of num_attention_heads = 1, got 1200",
        ),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps: expected a number from 0 to 1e+30, got -1e-06"),
        ({"gate_norm_eps": -1}, "gate_norm_eps: expected a number from 0 to 1e+30, got -1"),
        ({"initializer_range": -0.1}, "initializer_range: expected a number from 0 to 1e+30, got -0.1"),
        ({"recurrence_scale": math.nan}, "recurrence_scale: expected a number from -1e+30 to 1e+30, got nan"),
    ],
)
def test_values_out_of_range(config: Any, options: dict[str, Any], message: str) -> None:
    refuse(config, ValueError, options, message)


@pytest.mark.parametrize("config", OWN_SIZES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_per_head": "yes"}, "norm_per_head: expected True or False, got str"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a number from 0 to 1e+30, got str"),
        ({"recurrence_scale": True}, "recurrence_scale: expected a number from -1e+30 to 1e+30, got bool"),
    ],
)
def test_options_of_the_wrong_type(config: Any, options: dict[str, Any], message: str) -> None:
    refuse(config, TypeError, options, message)


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("size", [None, 2.0, True, "2", (2, True), [2.0, 2]], ids=repr)
def test_pixels_are_whole_numbers(name: str, size: Any) -> None:
    refuse(LightNetImageConfig, TypeError, {name: size}, f"{name}: {PIXELS} {size!r}")


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("size", [0, (2, 0), (), (2,), [2, 2, 2]], ids=repr)
def test_pixels_are_one_or_two_numbers_of_at_least_one(name: str, size: Any) -> None:
    refuse(LightNetImageConfig, ValueError, {name: size}, f"{name}: {PIXELS} {size!r}")


def test_an_image_has_a_class() -> None:
    refuse(LightNetImageConfig, ValueError, {"num_labels": 0}, f"num_labels: {WHOLE_NUMBER} 0")


@pytest.mark.parametrize(
    ("error", "token", "message"),
    [
        (ValueError, 61, "expected None or a number below vocab_size = 50, got 61"),
        (ValueError, 50, "expected None or a number below vocab_size = 50, got 50"),
        (ValueError, -51, "expected None or a number from -vocab_size = -50, got -51"),
        (TypeError, "0", "expected None or a whole number, got str"),
        (TypeError, True, "expected None or a whole number, got bool"),
    ],
)
def test_padding_is_a_token(error: type[Exception], token: Any, message: str) -> None:
    refuse(LightNetConfig, error, {"pad_token_id": token}, f"pad_token_id: {message}")


@pytest.mark.parametrize(
    "options",
    [
        {"key_dim": 256},
        {"key_dim": 512, "position_encoding": None},
        {"hidden_size": 512, "num_attention_heads": 1, "key_dim": 1, "gate_rank": 1, "intermediate_size": 1},
        {"rms_norm_eps": 0, "gate_norm_eps": 1, "recurrence_scale": -2, "initializer_range": 0},
        *({"pad_token_id": token} for token in (-50, -1, 0, 49)),
    ],
    ids=str,
)
def test_what_the_limits_allow_runs(options: dict[str, Any]) -> None:
    model = LightNetForCausalLM(LightNetConfig(**{**SIZES, "vocab_size": 50, **options}))
    assert model(model.dummy_inputs["input_ids"]).logits.shape[-1] == 50
