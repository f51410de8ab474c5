"""Llama with a weighting of its own: the architecture of transformers' Llama, the attention of sightline."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from sightline.hf import NAME, read_settings, write_settings
from sightline.weighting import LSSA


class SightlineLlamaConfig(LlamaConfig):
    """`LlamaConfig` with model type "sightline_llama" and a weighting in `sightline`, `LSSA()` where none is given.

    `sightline` is what `sightline.hf.write_settings` returns for a weighting. The saved config asks for the attention
    implementation "sightline": where sightline is missing, every class of transformers refuses it.

    Raises TypeError or ValueError where `sightline` is not such a value.

    >>> from sightline import LSSAR
    >>> SightlineLlamaConfig(sightline=write_settings(LSSAR())).sightline["weighting"]["reweight"]["power"]
    15.0
    """

    model_type = "sightline_llama"

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("sightline") is None:
            kwargs["sightline"] = write_settings(LSSA())
        read_settings(kwargs["sightline"])
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values, with the attention implementation that the model needs."""
        return {**super().to_dict(), "attn_implementation": NAME}


class _SightlineAttention:
    """Holds a model to the attention that it was trained with."""

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """ "sightline"; raises ValueError where another implementation is asked for."""
        if requested_attention not in (None, NAME):
            raise ValueError(
                f"attn_implementation: expected 'sightline' for {type(self).__name__}, whose weights belong to its "
                f"weighting, got {requested_attention!r}"
            )
        return NAME


class SightlineLlamaModel(_SightlineAttention, LlamaModel):
    """`LlamaModel` with the attention of `config.sightline`."""

    config_class = SightlineLlamaConfig


class SightlineLlamaForCausalLM(_SightlineAttention, LlamaForCausalLM):
    """`LlamaForCausalLM` with the attention of `config.sightline`.

    >>> from transformers import AutoModelForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> type(AutoModelForCausalLM.from_config(SightlineLlamaConfig(**sizes))).__name__
    'SightlineLlamaForCausalLM'
    """

    config_class = SightlineLlamaConfig


class SightlineLlamaForSequenceClassification(_SightlineAttention, LlamaForSequenceClassification):
    """`LlamaForSequenceClassification` with the attention of `config.sightline`."""

    config_class = SightlineLlamaConfig
