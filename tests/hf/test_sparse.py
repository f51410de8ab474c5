"""Models that select keys, or make some of their own, and tell each attention implementation in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sightline as sl
from sightline.hf import attention_forward, interface

LENGTH = 21
_EVERY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_EVERY |= {"bos_token_id": 1, "eos_token_id": None, "intermediate_size": 48, "moe_intermediate_size": 24}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_INDEX = {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 16}
_BLOCKS = {"index_block_size": 2, "index_topk_blocks": 2, "index_n_heads": 2, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV32": ("DeepseekV32", {"num_key_value_heads": 4, **_EXPERTS, **_LATENT, **_INDEX}),
    "GlmMoeDsa": ("GlmMoeDsa", {"num_key_value_heads": 4, **_EXPERTS, **_LATENT, **_INDEX}),
    # Sliding windows, and keys that stand for several tokens.
    "DeepseekV4": (
        "DeepseekV4",
        {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"], "sliding_window": 8}
        | {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, **_INDEX},
    ),
    "MiniMaxM3": (
        "MiniMaxM3VLText",
        {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "dense"]}
        | {"num_key_value_heads": 2, **_BLOCKS},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> Any:
    config_type, options = MODELS[name]
    config = getattr(transformers, f"{config_type}Config")(**_EVERY, **options)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 99, (2, length))


def assert_near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@every_model
def test_logits_and_gradients_are_those_of_before(name):
    model, ids = build(name), tokens()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> tuple[Tensor, list[Tensor | None]]:
        logits = model(ids, use_cache=False).logits
        return logits, list(torch.autograd.grad(logits.square().mean(), leaves, allow_unused=True))

    expected, expected_gradients = run()
    sl.swap_attention(model, sl.Softmax())
    logits, gradients = run()
    assert_near(logits, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_near(one, other)
    sl.restore_attention(model)
    sl.swap_attention(model, sl.LSSA())
    assert (model(ids, use_cache=False).logits - expected).abs().max() > 1e-2


# MiniMax M3 selects blocks without regard to padding. A row whose blocks are all padding sees no key, for which eager
# attention gives the mean of everything.
@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in MODELS for side in ("left", "right") if (name, side) != ("MiniMaxM3", "left")],
)
@torch.no_grad()
def test_padded_logits_are_those_of_before(name, side):
    model, ids = build(name), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :6] = 0
    if side == "right":
        mask = mask.flip(1)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    sl.swap_attention(model, sl.Softmax())
    result = model(ids, attention_mask=mask, use_cache=False).logits
    assert_near(result[mask.bool()], expected[mask.bool()])


@every_model
@torch.no_grad()
def test_generation_is_that_of_before(name):
    model, ids = build(name), tokens(11)
    options = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    sl.swap_attention(model, sl.Softmax())
    result = model.generate(ids, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert_near(torch.stack(result.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("form", ["bool", "float", None])
def test_selected_keys_are_a_mask(form):
    query, key, value = (torch.randn(2, 4, 7, 8) for _ in range(3))
    module = nn.Identity()
    module.config = None
    indices = torch.stack([torch.randperm(7)[:3] for _ in range(14)]).view(2, 7, 3)
    chosen = torch.zeros(2, 1, 7, 7, dtype=torch.bool).scatter(-1, indices[:, None], True)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, 7, 7)
    mask = {"bool": visible, "float": torch.where(visible, 0.0, torch.finfo(torch.float32).min), None: None}[form]
    result, _ = attention_forward(module, query, key, value, mask, indices=indices.int())
    expected = sl.attention(query, key, value, attn_mask=visible & chosen)
    torch.testing.assert_close(result, expected.transpose(1, 2))


# What a module's code looks up is what tells how it computes attention.
ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {}


def eager_attention_forward(module, query, key, value, attention_mask, **kwargs):
    raise AssertionError("not called")


class Selective(nn.Module):
    config = None

    def forward(self, implementation):
        tilted = implementation in ("eager", "sdpa")
        return ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward), tilted


def test_an_argument_for_other_implementations_than_eager_is_refused():
    assert interface.names_implementations(Selective)
    assert not interface.names_implementations(transformers.models.llama.modeling_llama.LlamaAttention)
    states = torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="tilt: Selective passes this argument"):
        attention_forward(Selective(), states, states, states, None, tilt=torch.ones(1))
    attention_forward(Selective(), states, states, states, None, tilt=None, use_cache=True)
