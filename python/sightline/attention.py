"""`sightline.attention`, the public operator, and `attention_rows`, exact weights of chosen rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sightline import reference
from sightline._checks import check_attention, check_attention_rows
from sightline.observe import AttentionStats, Observe
from sightline.ops import (
    call_attention_decode,
    choose_backend,
    decode_refusal,
    native_library,
    requested_backend,
    takes_decode_shortcut,
)
from sightline.ops.autocast import autocast_dtype, without_autocast
from sightline.weighting import WEIGHTINGS, Reweight, Softmax, Weighting

if native_library().loaded:
    from sightline.ops.attention import call_attention
    from sightline.ops.triton_attention import call_attention_triton

# torch.load takes them with weights_only=True, its default.
torch.serialization.add_safe_globals([AttentionStats, Observe, Reweight, *WEIGHTINGS.values()])

_WEIGHT_FUNCTIONS = {kind: number for number, kind in enumerate(WEIGHTINGS)}
_DEFAULT = Softmax()
# The reference materialises rows x N; this many numbers at once when it stands in for a kernel.
_REFERENCE_CHUNK = 1 << 24


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weighting: Weighting = _DEFAULT,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    value_weights: Tensor | None = None,
    key_segments: Tensor | None = None,
    observe: Observe | None = None,
    backend: str = "auto",
) -> Any:
    r"""Attention with a choice of weight function, in memory linear in the number of keys.

    The reference, which computes float64 and what no kernel takes, needs memory for M x N weights for its gradients.
    First derivatives, in reverse; second ones with ``backend="reference"``.

    With ``s_ij = c_i <q_i, k_j> + bias_ij`` over the keys that row i sees, the output is
    ``o_i = sum_j phi(s_ij) v_j / sum_j phi(s_ij)``; phi and c_i come from `weighting`, by default the exact softmax of
    every existing model. Every formula stands in ``sightline.reference``, which is also the equivalent plain PyTorch.

    Args:
        query: (B, H, M, D) in float32, float16 or bfloat16 (float64 is computed by the reference).
        key: (B, Hk, N, D). H must be a multiple of Hk: query head h reads key head ``h // (H / Hk)``.
        value: (B, Hk, N, Dv).
        weighting: `Softmax`, `Softplus`, `LSSA()` or `LSSAR()`.
        causal: rows see no later key. The last query is aligned with the last valid key, as in FlashAttention (torch's
            ``is_causal`` aligns the first query with the first key).
        window: (left, right), how many keys before and after its position a row sees, both ends included; None for
            unlimited.
        key_lengths: (B,) int32 or int64, the number of valid keys, for caches with unused slots.
        key_mask: (B, N) bool, True where a key takes part.
        attn_mask: broadcastable to (B, H, M, N); bool (True: visible) or, in the query's dtype or float32, added to the
            score (-inf: invisible, may need a gradient).
        alibi_slopes: (H,), subtracts ``slope_h |pos_i - j|`` from the score; has no gradient.
        sinks: (H,), logits that take part in the normaliser only (softmax without re-weighting); may need a gradient.
        scale: a number, or (H,) which may need a gradient. Default 1/sqrt(D), or ln(D) with ``normalize_qk``.
        dropout_p: probability in [0, 1) with which a weight is dropped; the mask is drawn from torch's generator.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 offsets of documents packed in one batch entry (B = 1); both
            or neither, not with `key_lengths`.
        value_weights: (B, Hk, N) or (B, H, N), for the statistic `weighted_value`, which this version does not compute.
        key_segments: (B, N) integers, for the statistic `segment_mass`, which this version does not compute.
        observe: an `Observe`: also return what the rows attended to. This version computes `log_normalizer` alone.
        backend: "auto", "native", "triton" or "reference"; SIGHTLINE_BACKEND overrides "auto".

    Returns:
        (B, H, M, Dv) in the query's dtype (autocast's, where that is on), a view of (B, M, H, Dv) memory; a row that
        sees no key gives 0. With `observe` the pair of it and an `AttentionStats`; its ``log_normalizer`` (B, H, M), in
        nats and at least float32, carries gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it.
        NotImplementedError: no backend has this combination.

    Sources: LSSA and LSSAR, arXiv 2501.13428; scalable softmax, arXiv 2501.19399; docs/MATH.md sections 1 and 2.

    >>> import torch
    >>> import sightline as sl
    >>> query, key, value = torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), torch.randn(1, 2, 16, 64)
    >>> sl.attention(query, key, value, weighting=sl.LSSAR(), causal=True).shape
    torch.Size([1, 8, 16, 64])
    """
    autocast = autocast_dtype(query) if isinstance(query, Tensor) else None
    check_attention(
        query,
        key,
        value,
        weighting=weighting,
        causal=causal,
        window=window,
        key_lengths=key_lengths,
        key_mask=key_mask,
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        value_weights=value_weights,
        key_segments=key_segments,
        observe=observe,
        backend=backend,
        autocast_dtype=autocast,
    )
    if autocast is not None:
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    refusal = None
    if query.is_cuda and requested_backend(backend) == "native":
        refusal = decode_refusal(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            cu_seqlens_q=cu_seqlens_q,
            others=(sinks, scale),
        )
    chosen = choose_backend(query, backend, value.shape[3], refusal)
    if (
        chosen == "native"
        and attn_mask is None
        and dropout_p == 0.0
        and cu_seqlens_q is None
        and takes_decode_shortcut(query, key, value, key_lengths, key_mask, alibi_slopes, sinks, scale)
    ):
        chosen = "decode"
    if chosen == "decode":
        output, log_normalizer = call_attention_decode(
            query,
            key,
            value,
            key_lengths,
            key_mask,
            alibi_slopes,
            sinks,
            scale if isinstance(scale, Tensor) else None,
            causal,
            *window_sides(window),
            scale_number(scale, weighting, query),
            *weighting_scalars(weighting),
        )
    elif chosen != "reference":
        call = call_attention if chosen == "native" else call_attention_triton
        outputs = call(
            query,
            key,
            value,
            key_lengths,
            key_mask,
            attn_mask if attn_mask is None or attn_mask.dim() == 4 else _with_four_axes(attn_mask),
            alibi_slopes,
            sinks,
            scale if isinstance(scale, Tensor) else None,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            value_weights,
            key_segments,
            causal,
            *window_sides(window),
            scale_number(scale, weighting, query),
            float(dropout_p),
            *weighting_scalars(weighting),
            False,
            0,
            0,
            0,
            0,
            0,
        )
        output, log_normalizer = outputs[0], outputs[1]
    else:
        output, log_normalizer = _reference_in_chunks(
            query,
            key,
            value,
            weighting=weighting,
            causal=causal,
            window=window,
            key_lengths=key_lengths,
            key_mask=key_mask,
            attn_mask=attn_mask,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            scale=scale,
            dropout_p=dropout_p,
            dropout_seed=seed,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    if observe is None:
        return output
    return output, AttentionStats(log_normalizer=log_normalizer if observe.log_normalizer else None)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    weighting: Weighting = _DEFAULT,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Exact attention weights of chosen query rows, (B, H, R, N), in O(R N) memory.

    `rows` (R,) int64 are row indices in [0, M); the other arguments are those of `attention`. The weights are float32
    (float64 for float64 inputs), sum to 1 over the keys of a row that sees any (less the share of a sink), and carry
    gradients. They are computed by the reference on any device.

    Raises TypeError or ValueError naming the argument; an index outside [0, M) raises IndexError.

    >>> import torch
    >>> import sightline as sl
    >>> query = key = torch.randn(1, 2, 1000, 16)
    >>> sl.attention_rows(query, key, torch.tensor([0, 999]), causal=True).sum(-1).round(decimals=3)
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    options: dict[str, Any] = {
        "weighting": weighting,
        "causal": causal,
        "window": window,
        "key_lengths": key_lengths,
        "key_mask": key_mask,
        "attn_mask": attn_mask,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "scale": scale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    check_attention_rows(query, key, rows, **options)
    with without_autocast(query.device):
        return reference.attention_weights(query, key, rows=rows, **options)[0]


def _with_four_axes(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.dim())]


def window_sides(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def scale_number(scale: float | Tensor | None, weighting: Weighting, query: Tensor) -> float:
    if scale is None:
        width = query.shape[3]
        return math.log(width) if weighting.normalize_qk else 1.0 / math.sqrt(width)
    return 1.0 if isinstance(scale, Tensor) else float(scale)


def weighting_scalars(weighting: Weighting) -> tuple[int, bool, bool, float, float, float, int]:
    """The weighting as the operator's scalars: weight_function to reweight_exempt_rows."""
    softcap = getattr(weighting, "softcap", None)
    reweight = weighting.reweight
    return (
        _WEIGHT_FUNCTIONS[weighting.kind],
        weighting.length_scale,
        weighting.normalize_qk,
        0.0 if softcap is None else softcap,
        *((0.0, 1.0, 3) if reweight is None else (reweight.power, reweight.offset, reweight.exempt_rows)),
    )


def _reference_in_chunks(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference over blocks of query rows, so that memory stays bounded while nothing needs a gradient.

    Without autocast, which would round the products of row and key factors too.
    """
    with without_autocast(query.device):
        return _reference_blocks(query, key, value, **options)


def _reference_blocks(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    per_row = batch * heads * key.shape[2]
    if torch.compiler.is_compiling() or queries * per_row <= _REFERENCE_CHUNK:
        output, log_normalizer = reference.attention(query, key, value, **options)
    else:
        step = max(1, _REFERENCE_CHUNK // max(per_row, 1))
        blocks = [
            reference.attention(query, key, value, rows=rows, **options)
            for rows in torch.arange(queries, device=query.device).split(step)
        ]
        output = torch.cat([block[0] for block in blocks], dim=2)
        log_normalizer = torch.cat([block[1] for block in blocks], dim=2)
    # The memory order that the kernels promise.
    return output.transpose(1, 2).contiguous().transpose(1, 2), log_normalizer
