"""A second road to the same numbers: transformers' own dense masks, and the formulas in float64.

Registered as the attention implementation "oracle". transformers' eager attention cannot be the reference: it computes
its softmax in float32 whatever the model's dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sightline import Softmax, reference
from sightline.hf import read_settings

NAME = "oracle"


def _visible(mask: Any, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Tensor, Tensor | None]:
    """Which keys are visible, (B or 1, 1, M, N), and a user's bias."""
    if mask is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        return (visible.tril() if is_causal else visible)[None, None], None
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask


def oracle_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by the formulas: softmax spelled out, other weightings by `sightline.reference`."""
    visible, bias = _visible(attention_mask, query, key, module.is_causal)
    bias = position_bias if bias is None else bias if position_bias is None else bias + position_bias
    weighting = read_settings(getattr(module.config, "sightline", None), getattr(module, "layer_idx", None))
    if isinstance(weighting, Softmax):
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
        score = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        score = score if bias is None else score + bias
        score = score.masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            sinks = s_aux.view(1, -1, 1, 1).expand(*score.shape[:3], 1)
            score = torch.cat([score, sinks], dim=-1)
        weights = torch.softmax(score, dim=-1)[..., : key.shape[2]].nan_to_num(0.0)
        output = torch.nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    else:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        mask = visible if bias is None else torch.where(visible, bias.to(query.dtype), -torch.inf)
        output, _ = reference.attention(query, key, value, weighting=weighting, attn_mask=mask.expand(shape))
    return output.transpose(1, 2).contiguous(), None


def oracle_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' mask, always made in full."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, oracle_attention)
AttentionMaskInterface.register(NAME, oracle_mask)


def oracle_of(model: Any) -> Any:
    """A copy of the model in float64 that computes its attention by the formulas."""
    double = copy.deepcopy(model).double()
    double.set_attn_implementation(NAME)
    if double._can_set_experts_implementation():
        # The default of mixtures of experts has no float64.
        double.set_experts_implementation("eager")
    return double
