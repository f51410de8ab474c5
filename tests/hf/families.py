"""The model families of the test matrix: tiny models with random weights, built from configs, nothing downloaded.

One row per family. Windows and chunks are shorter than the test sequences, so that they hide keys.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

TOKENS = 100
LENGTH = 21
BATCH = 2
WINDOW = 8

_HIDDEN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_DECODER = {
    **_HIDDEN,
    "vocab_size": TOKENS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_SWITCHED = {**_LAYER_TYPES, "use_sliding_window": True}


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    kind: "decoder", "encoder" or "encoder-decoder". dropout: the config's name for the dropout of attention weights.
    packed: the model tells documents apart by position_ids.
    """

    name: str
    title: str
    special: str
    model_type: str
    config_type: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"
    dropout: str = "attention_dropout"
    packed: bool = True

    def config(self, **changes: Any) -> Any:
        """A new config of this family."""
        options = copy.deepcopy({**self.options, **changes})
        return getattr(transformers, self.config_type)(**options)

    def model(self, implementation: str = "eager", **changes: Any) -> Any:
        """A new model with random weights, in evaluation mode."""
        config = self.config(**changes)
        config._attn_implementation = implementation
        model = getattr(transformers, self.model_type)(config).eval()
        # Fresh weights are so small that every score is near zero and no mask or scale would show. Vectors (norms,
        # biases, sinks) are moved off their initial zeros and ones.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:
                    parameter.copy_(torch.randn_like(parameter) * 0.8 / parameter.shape[-1] ** 0.5)
        return model

    def inputs(self, length: int = LENGTH) -> dict[str, Tensor]:
        """A batch without padding."""
        if self.name == "vit":
            return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
        tokens = torch.randint(3, TOKENS, (BATCH, length))
        if self.name == "whisper":
            return {"input_features": torch.randn(BATCH, 8, 32), "decoder_input_ids": tokens}
        if self.kind == "encoder-decoder":
            return {"input_ids": torch.randint(3, TOKENS, (BATCH, length + 2)), "decoder_input_ids": tokens}
        return {"input_ids": tokens}

    def padding(self, inputs: dict[str, Tensor], side: str) -> tuple[dict[str, Tensor], Tensor]:
        """Masks that hide the first ("left") or last tokens of one entry, and (B, N), which outputs are real."""
        real = None
        masks = {}
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if name in inputs:
                real = torch.ones_like(inputs[name])
                hidden = slice(0, 6) if side == "left" else slice(real.shape[1] - 6, None)
                real[0, hidden] = 0
                masks[mask] = real
        assert real is not None
        return masks, real.bool()


def _decoder(name: str, title: str, special: str, prefix: str, **options: Any) -> Family:
    config = {**_DECODER, **options.pop("config", {})}
    types = {"model_type": f"{prefix}ForCausalLM", "config_type": f"{prefix}Config", **options}
    return Family(name=name, title=title, special=special, options=config, **types)


FAMILIES = [
    _decoder("llama", "Llama", "grouped queries", "Llama"),
    _decoder("qwen2", "Qwen2", "window in some layers", "Qwen2", config=_SWITCHED),
    _decoder("qwen3", "Qwen3", "window in some layers", "Qwen3", config=_SWITCHED),
    _decoder("mistral", "Mistral", "window in every layer", "Mistral", config={"sliding_window": WINDOW}),
    _decoder(
        "gemma2",
        "Gemma 2",
        "softcap, window in some layers",
        "Gemma2",
        config={**_LAYER_TYPES, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    _decoder(
        "gemma3",
        "Gemma 3",
        "window in some layers",
        "Gemma3",
        config={**_LAYER_TYPES, "query_pre_attn_scalar": 8},
        config_type="Gemma3TextConfig",
    ),
    _decoder("phi3", "Phi-3", "window in every layer", "Phi3", config={"sliding_window": WINDOW}),
    _decoder("olmo2", "OLMo 2", "grouped queries", "Olmo2"),
    _decoder("granite", "Granite", "scale of its own", "Granite", config={"attention_multiplier": 0.2}),
    _decoder("smollm3", "SmolLM3", "layers without positions", "SmolLM3", config={"no_rope_layers": [1, 0]}),
    _decoder(
        "gpt_oss",
        "gpt-oss",
        "sinks, window in some layers",
        "GptOss",
        config={**_LAYER_TYPES, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    Family(
        name="gpt2",
        title="GPT-2",
        special="learned positions",
        model_type="GPT2LMHeadModel",
        config_type="GPT2Config",
        options={
            "vocab_size": TOKENS,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        dropout="attn_pdrop",
    ),
    _decoder("gpt_neox", "GPT-NeoX", "parallel residual", "GPTNeoX", config={"num_key_value_heads": 4}),
    _decoder(
        "llama4",
        "Llama 4 (text)",
        "chunked attention in some layers",
        "Llama4",
        config={
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        config_type="Llama4TextConfig",
    ),
    Family(
        name="bert",
        title="BERT",
        special="bidirectional",
        model_type="BertModel",
        config_type="BertConfig",
        options={**_HIDDEN, "vocab_size": TOKENS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        kind="encoder",
        dropout="attention_probs_dropout_prob",
        packed=False,
    ),
    Family(
        name="vit",
        title="ViT",
        special="images",
        model_type="ViTModel",
        config_type="ViTConfig",
        options={
            **_HIDDEN,
            "image_size": 16,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        kind="encoder",
        dropout="attention_probs_dropout_prob",
        packed=False,
    ),
    Family(
        name="t5",
        title="T5",
        special="position bias, cross-attention",
        model_type="T5ForConditionalGeneration",
        config_type="T5Config",
        options={
            "vocab_size": TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            # ReLU, the default, has a kink at which float32 and float64 may take different sides.
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
            "eos_token_id": None,
        },
        kind="encoder-decoder",
        dropout="dropout_rate",
        packed=False,
    ),
    Family(
        name="whisper",
        title="Whisper",
        special="audio, cross-attention",
        model_type="WhisperForConditionalGeneration",
        config_type="WhisperConfig",
        options={
            "vocab_size": TOKENS,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "decoder_start_token_id": 2,
            "suppress_tokens": [],
            "begin_suppress_tokens": None,
        },
        kind="encoder-decoder",
        packed=False,
    ),
]


def families(*kinds: str, packed: bool | None = None, without: tuple[str, ...] = ()) -> Any:
    """Parametrises a test over the families of these kinds (all where none is named), `without` those named."""
    chosen = [
        family
        for family in FAMILIES
        if (not kinds or family.kind in kinds)
        and (packed is None or family.packed == packed)
        and family.name not in without
    ]
    return pytest.mark.parametrize("family", chosen, ids=[family.name for family in chosen])


def output(model: Any, **inputs: Any) -> Tensor:
    """The logits, or where a model has none its last hidden state."""
    inputs = {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state
