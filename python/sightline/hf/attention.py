"""The attention function registered as "sightline": one call of `sightline.attention` for one layer of a model.

A new token on the CPU goes past the checks of that function straight to the decoding kernel (`_new_token`).

Softmax honours what the model asks for: scaling, softcap, sinks, position bias, dropout. Softplus replaces the softmax,
and with it scaling, softcap and sinks. Masks come as a `Visibility` from `sightline.hf.masks`, or as a user's 4-D mask.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sightline.attention import attention, scale_number, weighting_scalars, window_sides
from sightline.hf.interface import eager_parameters, names_implementations
from sightline.hf.settings import read_settings
from sightline.hf.visibility import Visibility
from sightline.observe import AttentionStats, Observe
from sightline.ops import decode_token
from sightline.weighting import WEIGHTINGS, Reweight, Softmax, Weighting

_STATISTICS = Observe(log_normalizer=True)
_CACHED = "_sightline_weighting"

# What models pass along that no attention function computes with.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)

_warned_types: set[type[nn.Module]] = set()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = False,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, AttentionStats | None]:
    """Attention of one layer, for transformers' `AttentionInterface`.

    Args:
        module: the layer's attention module; its `config.sightline` holds the weighting.
        query: (B, H, M, D). key: (B, Hk, N, D), not repeated. value: (B, Hk, N, Dv).
        attention_mask: a `Visibility` from `sightline_mask`; or a mask broadcastable to (B, H, M, N), bool (True:
            visible) or float (added to the scores; half the lowest number of its dtype and less: invisible); or None.
        dropout: probability with which a weight is dropped.
        scaling, softcap, s_aux: the model's scale, softcap and sink logits (H,), for softmax.
        is_causal: with no mask, whether rows see no later key; `module.is_causal` by default.
        sliding_window: the model's window; the mask already has it.
        position_bias: (1 or B, H, M, N), added to the scores.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) offsets of documents packed into one batch entry.
        output_attentions: return the layer's statistics in the place of its weights.
        indices: (B, M, k), the only keys that a row may see of those that the mask leaves (sparse attention).
        block_indices: the same by blocks of keys, as the module's `indexer` makes and reads them.

    Returns:
        (B, M, H, Dv), contiguous, and an `AttentionStats` or None.

    Raises:
        TypeError, ValueError: a mask that cannot be understood; `config.sightline` is wrong.
        NotImplementedError: an argument that changes this module's attention and is not known here.

    >>> module, states = nn.Identity(), torch.ones(1, 2, 4, 8)
    >>> module.config = None
    >>> attention_forward(module, states, states, states, None)[0].shape
    torch.Size([1, 4, 2, 8])
    """
    if kwargs:
        _refuse_unknown(module, kwargs)
    if indices is not None or block_indices is not None:
        positions = kwargs.get("position_ids")
        attention_mask = _selected(module, query, key, attention_mask, is_causal, indices, block_indices, positions)
    weighting = _weighting(module, scaling, softcap, s_aux is not None, query.shape[3])
    if (
        query.shape[2] == 1
        and position_bias is None
        and cu_seq_lens_q is None
        and dropout == 0.0
        and sliding_window is None
        and not output_attentions
    ):
        output = _new_token(module, query, key, value, attention_mask, weighting, scaling, s_aux)
        if output is not None:
            return output.transpose(1, 2), None
    options, end_to_end = _mask_options(
        module, query, key, attention_mask, position_bias, is_causal, sliding_window, cu_seq_lens_q, weighting
    )
    if type(weighting) is Softmax:
        options["sinks"] = s_aux
        if not weighting.normalize_qk:
            options["scale"] = scaling
    if cu_seq_lens_q is not None:
        options["cu_seqlens_q"] = cu_seq_lens_q.to(torch.int32)
        options["cu_seqlens_k"] = (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).to(torch.int32)
    batch = query.shape[0]
    if end_to_end:
        query, key, value = (_end_to_end(states) for states in (query, key, value))
    output = attention(
        query,
        key,
        value,
        weighting=weighting,
        dropout_p=dropout,
        observe=_STATISTICS if output_attentions else None,
        **options,
    )
    statistics = None
    if output_attentions:
        output, statistics = output
    output = output.transpose(1, 2)
    if end_to_end:
        output = output.unflatten(1, (batch, -1)).squeeze(0)
        if statistics is not None:
            log_normalizer = statistics.log_normalizer.unflatten(2, (batch, -1)).squeeze(0).transpose(0, 1)
            statistics = AttentionStats(log_normalizer=log_normalizer)
    return output, statistics


def _new_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Visibility | Tensor | None,
    weighting: Weighting,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """Attention of one new token, (B, H, 1, Dv), past the checks of `sightline.attention`; None where it is needed."""
    softmax = type(weighting) is Softmax
    scale = scaling if softmax and not weighting.normalize_qk else None
    if scale is None:
        scale = scale_number(None, weighting, query)
    sinks = sinks if softmax else None
    # What the long way refuses, in its words.
    unusable = not math.isfinite(scale) or (sinks is not None and weighting.reweight is not None)
    if unusable or (weighting.normalize_qk and query.shape[3] == 1):
        return None
    scalars = (scale, *weighting_scalars(weighting))
    if mask is None:
        return decode_token(query, key, value, None, None, sinks, False, -1, -1, *scalars)
    if type(mask) is not Visibility or mask.document_offsets is not None or mask.batch != query.shape[0]:
        return None
    _check_lengths(module, mask, query, key)
    sides = window_sides(mask.window)
    return decode_token(query, key, value, mask.key_lengths, mask.key_mask, sinks, mask.causal, *sides, *scalars)


def _mask_options(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Visibility | Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor | None,
    weighting: Weighting,
) -> tuple[dict[str, Any], bool]:
    """What `sightline.attention` is told of visibility, and whether batch entries are to be laid end to end for it."""
    if mask is None:
        causal = _is_causal_without_mask(module, is_causal, sliding_window, query, key, cu_seq_lens_q)
        return {"causal": causal, "attn_mask": position_bias}, False
    if not isinstance(mask, Visibility):
        checked = _checked_mask(module, mask, weighting)
        if position_bias is not None:
            checked = _added(position_bias, checked, query)
        # A mask in another float dtype than the model's, as generation and users make them.
        return {"attn_mask": checked if checked.dtype == torch.bool else checked.to(query.dtype)}, False
    _check_lengths(module, mask, query, key)
    options: dict[str, Any] = {
        "causal": mask.causal,
        "window": mask.window,
        "key_lengths": mask.key_lengths,
        "key_mask": mask.key_mask,
        "attn_mask": position_bias,
    }
    if mask.document_offsets is None or cu_seq_lens_q is not None:
        return options, False
    if position_bias is not None:
        # A bias has a place for every pair of a batch entry, but none for pairs of different entries.
        return {"attn_mask": _added(position_bias, mask.dense(), query)}, False
    options["cu_seqlens_q"] = options["cu_seqlens_k"] = mask.document_offsets
    return options, True


def _weighting(
    module: nn.Module, scaling: float | None, softcap: float | None, has_sinks: bool, width: int
) -> Weighting:
    """The weighting of this layer, with the model's softcap in it; read again whenever config.sightline changes."""
    # Not getattr: a config of transformers looks in many places for what it does not have, for every layer and token.
    settings = None if module.config is None else vars(module.config).get("sightline")
    cached = getattr(module, _CACHED, None)
    if cached is not None and cached[0] == settings and cached[1] == softcap:
        return cached[2]
    layer = getattr(module, "layer_idx", None)
    if torch.compiler.is_compiling():
        return _traced(settings, layer, softcap)
    weighting = _read(settings, layer, softcap)
    replaced = {}
    if weighting.normalize_qk or not isinstance(weighting, Softmax):
        replaced["scaling"] = scaling is not None and abs(scaling * width**0.5 - 1) > 1e-6
    if not isinstance(weighting, Softmax):
        replaced.update(softcap=softcap is not None, sinks=has_sinks)
    _say_what_is_replaced(module, weighting, [name for name, is_set in replaced.items() if is_set])
    setattr(module, _CACHED, (copy.deepcopy(settings), softcap, weighting))
    return weighting


def forget_weightings(model: nn.Module) -> None:
    """Take away what the modules of a model have kept of their weighting."""
    for module in model.modules():
        vars(module).pop(_CACHED, None)


def _read(settings: Any, layer: int | None, softcap: float | None) -> Weighting:
    weighting = read_settings(settings, layer)
    if isinstance(weighting, Softmax) and weighting.softcap is None and softcap is not None:
        return dataclasses.replace(weighting, softcap=softcap)
    return weighting


@torch._dynamo.assume_constant_result
def _read_as_constants(settings: Any, layer: int | None, softcap: float | None) -> tuple[Any, ...]:
    """The options of the weighting: a compiler takes numbers for constants, but not what it would have to trace."""
    weighting = _read(settings, layer, softcap)
    reweight = weighting.reweight
    sharpening = None if reweight is None else (reweight.power, reweight.offset, reweight.exempt_rows)
    names = [field.name for field in dataclasses.fields(weighting) if field.name != "reweight"]
    return weighting.kind, sharpening, tuple((name, getattr(weighting, name)) for name in names)


def _traced(settings: Any, layer: int | None, softcap: float | None) -> Weighting:
    """What `_read` gives, in a graph."""
    kind, sharpening, options = _read_as_constants(settings, layer, softcap)
    reweight = None if sharpening is None else Reweight(*sharpening)
    return WEIGHTINGS[kind](reweight=reweight, **dict(options))


def _say_what_is_replaced(module: nn.Module, weighting: Weighting, replaced: list[str]) -> None:
    if replaced and type(module) not in _warned_types:
        _warned_types.add(type(module))
        warnings.warn(
            f"{type(module).__name__}: {weighting} replaces the model's softmax and with it its {', '.join(replaced)}",
            stacklevel=4,
        )


def _refuse_unknown(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise for an argument that this module's own eager attention computes with and that is not known here."""
    for name, value in arguments.items():
        if name in _WITHOUT_EFFECT or value is None:
            continue
        if name == "cache":
            raise NotImplementedError(
                f"cache: expected no paged cache (continuous batching) in {type(module).__name__}, got "
                f"{type(value).__name__}; use generate(), or set_attn_implementation('sdpa')"
            )
        known = eager_parameters(type(module))
        # One that names implementations may do for eager by itself what it leaves to others by an argument.
        if known is None or name in known or names_implementations(type(module)):
            raise NotImplementedError(
                f"{name}: {type(module).__name__} passes this argument to its attention, and sightline does not know "
                "it; restore the model's own attention (restore_attention)"
            )


def _selected(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Visibility | Tensor | None,
    is_causal: bool | None,
    indices: Tensor | None,
    block_indices: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """The mask with what a sparse layer has selected: (B, 1 or H, M, N), as its eager attention would be given it."""
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    if mask is None:
        causal = _is_causal_without_mask(module, is_causal, None, query, key, None)
        mask = Visibility(batch, queries, keys, causal, device=query.device)
    if isinstance(mask, Visibility):
        _check_lengths(module, mask, query, key)
        mask = mask.dense()
    if block_indices is not None:
        indexer: Any = module.indexer
        return indexer.build_block_mask(block_indices, mask, keys, query.dtype, query.device, positions)
    assert indices is not None
    chosen = torch.zeros((batch, 1, queries, keys), dtype=torch.bool, device=query.device)
    chosen.scatter_(-1, indices[:, None].to(torch.int64), True)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _check_lengths(module: nn.Module, mask: Visibility, query: Tensor, key: Tensor) -> None:
    if mask.queries != query.shape[2] or mask.keys != key.shape[2]:
        raise ValueError(
            f"attention_mask: expected {query.shape[2]} queries and {key.shape[2]} keys as in {type(module).__name__}, "
            f"got a mask for {mask.queries} and {mask.keys}"
        )


def _is_causal_without_mask(
    module: nn.Module,
    is_causal: bool | None,
    sliding_window: int | None,
    query: Tensor,
    key: Tensor,
    cu_seq_lens_q: Tensor | None,
) -> bool:
    """What a missing mask means: nothing is hidden, but by causality where the module is causal."""
    # As transformers has it, but for cross attention that does not say.
    default = "CrossAttention" not in type(module).__name__
    causal = getattr(module, "is_causal", default) if is_causal is None else bool(is_causal)
    queries, keys = query.shape[2], key.shape[2]
    if causal and cu_seq_lens_q is None and queries != 1 and queries != keys:
        raise ValueError(
            f"attention_mask: expected a mask for {queries} queries and {keys} keys of the causal "
            f"{type(module).__name__}, got None, which does not say where the queries stand"
        )
    if causal and sliding_window is not None and sliding_window < keys:
        raise ValueError(
            f"attention_mask: expected a mask with the window of {sliding_window} keys of {type(module).__name__}, "
            "got None"
        )
    return causal


def _checked_mask(module: nn.Module, mask: Any, weighting: Weighting) -> Tensor:
    """A user's mask with what it hides as False or -inf: a finite bias would be a visible key."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask: expected a bool or float mask in {type(module).__name__}, got {came}")
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask: expected 4 axes (B, 1 or H, M, N) in {type(module).__name__}, got shape "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return mask
    invisible = mask <= torch.finfo(mask.dtype).min / 2
    if getattr(weighting, "softcap", None) is None:
        return mask.masked_fill(invisible, -torch.inf)
    # The model caps the score before the mask is added, sightline the whole score: the same only without a bias.
    if torch.compiler.is_compiling() or not bool((invisible | (mask == 0)).all()):
        raise NotImplementedError(
            f"attention_mask: expected a bool mask in {type(module).__name__}, whose softcap comes before a bias, got "
            f"{mask.dtype}"
        )
    return ~invisible


def _added(bias: Tensor, mask: Tensor, query: Tensor) -> Tensor:
    """A bias and a mask as one float mask."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf).to(query.dtype)
    return (bias + mask).to(query.dtype)


def _end_to_end(states: Tensor) -> Tensor:
    """(B, H, N, D) as one batch entry (1, H, B * N, D), a view where the memory is a projection's (B, N, H * D)."""
    return states.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)
