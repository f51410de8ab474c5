"""LightNet as a language model on transformers' classes: a state of constant size in the place of keys and values."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from sightline.models.lightnet_cache import RecurrenceCache
from sightline.models.lightnet_checks import (
    check_cache,
    check_positions,
    check_tokens,
    documents_of,
    key_mask_of,
)
from sightline.models.lightnet_config import LightNetConfig, LightNetImageConfig, attention_options
from sightline.nn import LightNetBlock

logger = logging.get_logger(__name__)


class LightNetLayer(GradientCheckpointingLayer, LightNetBlock):
    """`sightline.nn.LightNetBlock` that gradient checkpointing can compute again, with its state in a cache."""

    def __init__(
        self,
        config: LightNetConfig | LightNetImageConfig,
        layer_idx: int,
        *,
        causal: bool = True,
        position_axes: int | None = None,
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            hidden_dim=config.intermediate_size,
            causal=causal,
            position_axes=position_axes,
            **attention_options(config),
        )
        self.attn.g_norm.eps = config.gate_norm_eps
        self.layer_idx = layer_idx
        # Parameters are drawn from the leaves up and once only, so that the leaf itself must say what it is.
        projection: Any
        for projection in (self.attn.o_proj, self.mlp.down_proj):
            projection.writes_to_residual = True

    def forward(self, hidden: Tensor, *, past_key_values: RecurrenceCache | None = None, **arguments: Any) -> Any:
        """(B, N, hidden_size) to the same; goes on from its state in the cache and leaves the new one there."""
        if past_key_values is None:
            return super().forward(hidden, **arguments)
        layer = past_key_values.layer(self.layer_idx)
        output, state = super().forward(hidden, initial_state=layer.state, output_final_state=True, **arguments)
        layer.store(state, hidden.shape[1])
        return output


class LightNetPreTrainedModel(PreTrainedModel):
    """What LightNet's models share: initialisation, saving and loading."""

    config_class: Any = LightNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightNetLayer"]  # noqa: RUF012 (a name and type that transformers reads)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A state cannot be rolled back: generate() then refuses assisted decoding and prompt lookup.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and getattr(module, "writes_to_residual", False):
            init.normal_(module.weight, std=self.config.initializer_range * (2 * self.config.num_hidden_layers) ** -0.5)
        else:
            super()._init_weights(module)


class LightNetModel(LightNetPreTrainedModel):
    """LightNet without a head: token embedding, pre-norm blocks, a final norm.

    >>> sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> LightNetModel(LightNetConfig(**sizes))(torch.randint(50, (1, 7))).last_hidden_state.shape
    torch.Size([1, 7, 32])
    """

    def __init__(self, config: LightNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        axes = None if config.position_encoding is None else 1
        self.layers = nn.ModuleList(
            LightNetLayer(config, index, position_axes=axes) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrenceCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, N, hidden_size) and the cache to go on from.

        Args:
            input_ids: (B, N) tokens; or inputs_embeds (B, N, hidden_size).
            attention_mask: (B, N) or (B, N_before + N), 0 where a token is padding, on either side.
            position_ids: (B, N); where they do not count on by 1, without an attention_mask, a new document begins
                with an empty state. 0, 1, 2, ... after the tokens of the cache by default. A compiled model cannot look
                at them: without a cache they mean documents, as many as there are tokens at most, and leave no cache
                (`cu_seq_lens_q` costs less); with one they have to count on.
            past_key_values: the `RecurrenceCache` of the tokens before these.
            use_cache: also return a cache; config.use_cache by default, False in training.
            cu_seq_lens_q: (documents + 1,) int32 or int64 offsets of documents packed into one row, as transformers'
                DataCollatorWithFlattening makes them. One beyond the end is the end. For tokens outside of all
                documents the recurrence gives 0: they read no other, and none reads them.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or two exclude each other.
        """
        if output_attentions:
            raise ValueError("output_attentions: expected False, for a recurrence has no attention weights; got True")
        batch, length = check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        check_positions(position_ids, batch, length)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_cache(past_key_values, self.config, batch, hidden.dtype)
        # What goes on from a cache is one document, which can be checked where numbers can be looked at.
        unchecked = torch.compiler.is_compiling() and past_key_values is not None
        documents = documents_of(batch, length, attention_mask, None if unchecked else position_ids, cu_seq_lens_q)
        if documents is not None and past_key_values is not None:
            raise ValueError("past_key_values: expected None with packed documents, which end in a state each")
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and past_key_values is not None:
            raise ValueError("past_key_values: expected None with gradient checkpointing, which runs every layer twice")
        if checkpointing and use_cache:
            logger.warning_once(
                "use_cache=True makes no cache with gradient checkpointing, which runs every layer twice"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None and documents is None and not checkpointing:
            past_key_values = RecurrenceCache(len(self.layers))
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        arguments: dict[str, Any] = {"key_mask": key_mask_of(attention_mask, batch, seen, length)}
        if self.config.position_encoding is not None:
            if position_ids is None:
                position_ids = torch.arange(seen, seen + length, device=hidden.device).unsqueeze(0)
            arguments["positions"] = position_ids.unsqueeze(-1)
        if documents is not None:
            # Rows become documents of one long row, which is what the recurrence takes.
            arguments["cu_seqlens"] = documents
            hidden = hidden.flatten(0, 1).unsqueeze(0)
            if "positions" in arguments:
                arguments["positions"] = arguments["positions"].expand(batch, length, 1).reshape(1, -1, 1)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden.view(batch, length, self.config.hidden_size))
            hidden = layer(hidden, past_key_values=past_key_values, **arguments)
        hidden = self.norm(hidden)
        if output_hidden_states:
            states.append(hidden.view(batch, length, self.config.hidden_size))
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden.view(batch, length, self.config.hidden_size),
            past_key_values=past_key_values,
            hidden_states=tuple(states) or None,
        )
        return output if _as_dict(self, return_dict) else output.to_tuple()


class LightNetForCausalLM(LightNetPreTrainedModel, GenerationMixin):
    """LightNet with a language-model head: linear in the context, with a state of constant size when it generates.

    `generate()` works with greedy search, sampling and beam search; its cache is a `RecurrenceCache`. What needs to
    take tokens back (assisted decoding, prompt lookup) and other caches (static, quantized, offloaded) are refused.

    >>> from transformers import AutoModelForCausalLM
    >>> sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = AutoModelForCausalLM.from_config(LightNetConfig(**sizes)).eval()
    >>> prompt = torch.randint(3, 50, (1, 7))
    >>> model.generate(prompt, max_new_tokens=5, min_new_tokens=5, pad_token_id=0).shape
    torch.Size([1, 12])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LightNetConfig) -> None:
        super().__init__(config)
        self.model = LightNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrenceCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, N, vocab_size), and the loss where `labels` (B, N) are given.

        Labels are shifted inside: `labels=input_ids` trains on the next token; -100 is left out. `logits_to_keep`: the
        last so many positions, or a tensor of indices along N; 0 is all. The other arguments are those of
        `LightNetModel.forward`.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return result if _as_dict(self, return_dict) else result.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Gives generate() a `RecurrenceCache` where it would make a cache of keys and values."""
        if self.model.gradient_checkpointing and self.training and generation_config.use_cache is not False:
            raise ValueError(
                "use_cache: expected False in training with gradient checkpointing, which runs every layer twice; "
                "call eval() on the model before generate()"
            )
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected None, for {type(self).__name__} has a state of constant size in the "
                f"place of keys and values, got {implementation!r}"
            )
        if generation_config.is_assistant:
            raise ValueError(
                f"assistant_model: expected a model whose cache can give tokens back, got {type(self).__name__}"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache(given, self.config)
            # As the method that this one replaces marks it: the caller goes on with this cache.
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrenceCache(self.config.num_hidden_layers)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError, as does `generate_batch`: its pages hold keys and values, not states."""
        raise NotImplementedError(
            f"generate_batch: its cache holds keys and values, and {type(self).__name__} has a state of constant size "
            "in their place; use generate()"
        )


def _as_dict(model: PreTrainedModel, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)
