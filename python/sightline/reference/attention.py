"""Weighted attention by the formulas of MATH.md, sections 1 and 2, as written: no tiles, no tricks, nothing in place.

Products use the inputs as they are; scores, weights and row quantities are in the inputs' dtype, at least float32.
Every division, logarithm and exponential of a row that has nothing to say (no visible key, no spread) is selected away
before it is taken as well as after, so that its derivative is zero and not 0 * inf.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sightline.reference.dropout import dropout_keep
from sightline.reference.products import pair_product, weighted_sum
from sightline.reference.visibility import visible_keys

NORM_FLOOR = 1e-6
FLAT_ROW = 2.0**-16


def _inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=dtype)
    # The derivative of a norm that is not finite would make NaN even of rows that nothing sees. Those that something
    # sees have theirs from the product.
    x = torch.where(norm.isfinite(), x, x.detach())
    return 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp(min=NORM_FLOOR)


def _without_gradient_at_the_floor(x: Tensor, dtype: torch.dtype) -> Tensor:
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=dtype)
    return torch.where(norm < NORM_FLOOR, x.detach(), x)


def _row_maximum(x: Tensor) -> Tensor:
    """The largest entry of each row, a constant to autograd; -inf where there are no columns at all."""
    return x.detach().amax(-1, keepdim=True) if x.shape[-1] else x.new_full((*x.shape[:-1], 1), -torch.inf)


def _product_scores(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    count: Tensor,
    weighting: Any,
    scale: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """c_i <q_i, k_j> for visible j, 0 elsewhere."""
    width = query.shape[-1]
    if weighting.normalize_qk:
        query, key = (_without_gradient_at_the_floor(x, dtype) for x in (query, key))
    product = torch.where(visible, pair_product(query.to(dtype), key.to(dtype)), 0)
    if weighting.normalize_qk:
        inverse = pair_product(_inverse_norm(query, dtype), _inverse_norm(key, dtype))
        product = product * torch.where(visible, inverse, 0)
    if isinstance(scale, Tensor):
        factor: float | Tensor = scale.to(dtype).view(1, -1, 1, 1)
    elif scale is None:
        factor = math.log(width) if weighting.normalize_qk else 1 / math.sqrt(width)
    else:
        factor = scale
    if weighting.length_scale:
        factor = factor * count.clamp(min=1).to(dtype).log()
    return product * factor


def _bias(attn_mask: Tensor | None, alibi_slopes: Tensor | None, distance: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to the score: a float attn_mask, and minus slope_h |pos_i - j|."""
    bias = attn_mask.to(dtype) if attn_mask is not None and attn_mask.dtype != torch.bool else None
    if alibi_slopes is not None:
        slope = alibi_slopes.to(dtype).view(1, -1, 1, 1)
        bias = (0 if bias is None else bias) - slope * distance.abs().to(dtype)
    return bias


def _softmax_function(
    scores: Tensor, visible: Tensor, count: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """f_ij = exp(s_ij - shift_i), Z_i with the sink in it, and shift_i, the largest score (or the sink)."""
    shift = _row_maximum(torch.where(visible, scores, -torch.inf))
    shift = torch.where(count > 0, shift, -torch.inf if sinks is not None else 0)
    sink = None if sinks is None else sinks.to(scores.dtype).view(1, -1, 1, 1)
    if sink is not None:
        shift = torch.maximum(shift, sink.detach())
    weight = torch.where(visible, torch.where(visible, scores - shift, 0).exp(), 0)
    normalizer = weight.sum(-1, keepdim=True)
    if sink is not None:
        normalizer = normalizer + (sink - shift).exp()
    return weight, normalizer, shift


def _softplus_function(
    scores: Tensor, visible: Tensor, count: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """f_ij = log(1 + exp(s_ij)), its sum Z_i, and no shift.

    logaddexp keeps the small tail (torch's softplus switches to the identity at 20) and its derivative is sigmoid(s)
    on both sides and at 0.
    """
    weight = torch.where(visible, torch.logaddexp(scores, torch.zeros_like(scores)), 0)
    normalizer = weight.sum(-1, keepdim=True)
    return weight, normalizer, torch.zeros_like(normalizer)


WEIGHT_FUNCTIONS = {"softmax": _softmax_function, "softplus": _softplus_function}


def _reweighted(plain: Tensor, weight: Tensor, normalizer: Tensor, count: Tensor, reweight: Any) -> Tensor:
    """W_ij of section 2 in its kernel form; `plain` is a_ij, which a flat row keeps."""
    offset = reweight.offset * (count > reweight.exempt_rows).to(weight.dtype)
    mean = offset * normalizer / count.clamp(min=1)
    largest = _row_maximum(weight)
    peak = largest - mean.detach()
    flat = (count == 0) | (largest == 0) | ((offset > 0) & (peak <= FLAT_ROW * largest))

    excess = (weight - mean).relu()
    sharp = (excess / torch.where(flat, 1, peak)) ** reweight.power
    return torch.where(flat, plain, sharp / torch.where(flat, 1, sharp.sum(-1, keepdim=True)))


def _reweighted_literally(plain: Tensor, count: Tensor, reweight: Any) -> Tensor:
    """ReLU(n_i a_ij - O_i)^p and a second l1 normalisation: the paper's form, in which a row without excess gives 0."""
    offset = reweight.offset * (count > reweight.exempt_rows).to(plain.dtype)
    sharp = (count * plain - offset).relu() ** reweight.power
    total = sharp.sum(-1, keepdim=True)
    return sharp / torch.where(total == 0, 1, total)


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    weighting: Any,
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
    rows: Tensor | None = None,
    literal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention weights of query rows, before dropout, and their log normalizers.

    query (B, H, M, D), key (B, Hk, N, D); `weighting` is a `Softmax` or `Softplus` (or anything with their fields); the
    other options are those of `sightline.attention`. `rows` (R,) int64 are the indices of the rows wanted, all M by
    default: memory is O(R N), while positions, masks and lengths go on referring to all M rows. `literal` takes
    re-weighting in the form the paper writes (arXiv 2501.13428), which overflows below float64.

    Returns the weights (B, H, R, N) and ln Z (B, H, R) in nats, in the query's dtype, at least float32.

    >>> import torch
    >>> from sightline.weighting import LSSA
    >>> query = key = torch.ones(1, 1, 4, 8)
    >>> weights, log_normalizer = attention_weights(query, key, weighting=LSSA(), causal=True)
    >>> weights[0, 0, 2]
    tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    queries = query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if rows is None:
        rows = torch.arange(queries, device=query.device)
    else:
        query = query.index_select(2, rows)
    if attn_mask is not None:
        attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        attn_mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask.index_select(2, rows)
    visible, distance = visible_keys(
        rows,
        queries,
        key.shape[2],
        causal=causal,
        window=window,
        key_lengths=key_lengths,
        key_mask=key_mask,
        attn_mask=attn_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    count = visible.sum(-1, keepdim=True)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    scores = _product_scores(query, key, visible, count, weighting, scale, dtype)
    bias = _bias(attn_mask, alibi_slopes, distance, dtype)
    if bias is not None:
        scores = scores + torch.where(visible, bias, 0)
    softcap = getattr(weighting, "softcap", None)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    weight, normalizer, shift = WEIGHT_FUNCTIONS[weighting.kind](scores, visible, count, sinks)
    empty = (count == 0) | (normalizer == 0)
    divisor = torch.where(empty, 1, normalizer)
    silent = -torch.inf if sinks is None else sinks.detach().to(dtype).view(1, -1, 1, 1)
    log_normalizer = torch.where(empty, silent, divisor.log() + shift).squeeze(-1)

    weights = weight / divisor
    if weighting.reweight is not None and literal:
        weights = _reweighted_literally(weights, count, weighting.reweight)
    elif weighting.reweight is not None:
        weights = _reweighted(weights, weight, normalizer, count, weighting.reweight)
    # The normaliser of a row may be NaN; what the row cannot see stays 0.
    return torch.where(visible, weights, 0), log_normalizer


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weighting: Any,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    rows: Tensor | None = None,
    literal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention output of query rows and their log normalizers, differentiable by autograd.

    query (B, H, M, D), key (B, Hk, N, D), value (B, Hk, N, Dv); the options are those of `attention_weights`, and
    `dropout_seed`, one int64, needed when `dropout_p` is not 0.

    Returns the output (B, H, R, Dv) in the value's dtype and ln Z (B, H, R) in nats, at least float32.

    >>> import torch
    >>> from sightline.weighting import LSSAR
    >>> query, key, value = torch.rand(1, 4, 6, 8), torch.rand(1, 2, 6, 8), torch.ones(1, 2, 6, 3)
    >>> output, log_normalizer = attention(query, key, value, weighting=LSSAR(), causal=True)
    >>> output.shape, torch.allclose(output, torch.ones_like(output))
    (torch.Size([1, 4, 6, 3]), True)
    """
    weights, log_normalizer = attention_weights(
        query,
        key,
        weighting=weighting,
        causal=causal,
        window=window,
        key_lengths=key_lengths,
        key_mask=key_mask,
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        rows=rows,
        literal=literal,
    )
    if dropout_p:
        if dropout_seed is None:
            raise ValueError("dropout_seed: expected one int64 because dropout_p is not 0, got None")
        rows = torch.arange(query.shape[2], device=query.device) if rows is None else rows
        batch, heads, _, keys = weights.shape
        keep = dropout_keep(dropout_seed, dropout_p, batch, heads, rows, keys, query.device)
        weights = torch.where(keep, weights / (1 - dropout_p), 0)
    # A key of zero weight gets no say in the gradient either: its value may be NaN.
    weights = torch.where(weights != 0, weights, 0).to(value.dtype)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return weighted_sum(weights, value), log_normalizer
