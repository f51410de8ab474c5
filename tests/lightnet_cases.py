"""Small LightNet language models and their inputs, for the tests of tests/models."""

from __future__ import annotations

import torch

from sightline.models import LightNetConfig, LightNetForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large enough for every part of a small model to count
    # The norm divides rounding errors by the size of what a head gives, which of few tokens is 0 now and then.
    "gate_norm_eps": 1e-2,
}
POSITIONS = [None, "lrpe"]


def tokens(*shape):
    return torch.randint(1, SIZES["vocab_size"], shape)


def build(**options):
    return LightNetForCausalLM(LightNetConfig(**{**SIZES, **options})).eval()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
