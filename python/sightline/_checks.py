"""What the public functions ask of their arguments, checked before anything is computed.

TypeError for a wrong type or dtype, ValueError for a shape or value, NotImplementedError for a combination that no
backend has. A message names the argument, what was expected, what came, and where it is not plain, the remedy. No check
reads the numbers inside a tensor, so that none synchronises with a device or breaks a traced graph.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import Tensor

from sightline.observe import Observe
from sightline.weighting import EXPECTED_WEIGHTING, Softmax, Weighting

BACKENDS = ("auto", "native", "triton", "reference")

# Dictionaries, because looking a dtype up is the quickest test there is, eager and traced.
_FLOATS = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_AUTOCAST_FLOATS = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16))
_BOOL = {torch.bool: None}
_INDEX = dict.fromkeys((torch.int32, torch.int64))
_INT32 = {torch.int32: None}
_INT64 = {torch.int64: None}
_INTEGERS = dict.fromkeys((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_INTEGER_TYPES = (int, torch.SymInt)
# What float32 kernels can multiply scores with.
_LARGEST_SCALE = 1e30
_NUMBER_TYPES = (int, float, torch.SymInt, torch.SymFloat)


def check_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    weighting: Any,
    causal: Any,
    window: Any,
    key_lengths: Any,
    key_mask: Any,
    attn_mask: Any,
    alibi_slopes: Any,
    sinks: Any,
    scale: Any,
    dropout_p: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    value_weights: Any,
    key_segments: Any,
    observe: Any,
    backend: Any,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Raise what `sightline.attention` promises for these arguments.

    `autocast_dtype` is the dtype that autocast is about to give query, key and value, None where it does nothing.

    >>> import torch, sightline
    >>> sightline.attention(torch.rand(1, 2, 5, 64), torch.rand(1, 2, 5, 80), torch.rand(1, 2, 5, 64))
    Traceback (most recent call last):
    ...
    ValueError: key: expected head width 64 as in query, got 80
    """
    _check_heads("query", query, None, autocast_dtype)
    _check_heads("key", key, query, autocast_dtype)
    _check_heads("value", value, query, autocast_dtype)
    query_shape, key_shape = query.shape, key.shape
    _check_query_and_key(query_shape, key_shape)
    _check_value(value.shape, key_shape)
    _check_weighting(weighting, scale, query_shape)
    if causal is not True and causal is not False:
        raise _wrong_type("causal", "True or False", causal)
    if backend not in BACKENDS:
        _refuse_backend(backend)
    if window is not None:
        _check_window(window)
    if key_lengths is not None or key_mask is not None:
        _check_key_selection(key_lengths, key_mask, query, key_shape)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, query, key_shape, autocast_dtype)
    if alibi_slopes is not None:
        _check_alibi_slopes(alibi_slopes, query)
    if sinks is not None:
        _check_sinks(sinks, query, weighting)
    if scale is not None:
        _check_scale(scale, query)
    if type(dropout_p) is not float or dropout_p != 0.0:
        _check_dropout(dropout_p)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        _check_documents(cu_seqlens_q, cu_seqlens_k, key_lengths, query)
    if observe is not None or value_weights is not None or key_segments is not None:
        _check_statistics(observe, value_weights, key_segments, query, key_shape)


def check_attention_rows(
    query: Any,
    key: Any,
    rows: Any,
    *,
    weighting: Any,
    causal: Any,
    window: Any,
    key_lengths: Any,
    key_mask: Any,
    attn_mask: Any,
    alibi_slopes: Any,
    sinks: Any,
    scale: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
) -> None:
    """Raise what `sightline.attention_rows` promises for these arguments.

    >>> import torch, sightline
    >>> sightline.attention_rows(torch.rand(1, 2, 5, 64), torch.rand(1, 2, 5, 64), torch.tensor([0.5]))
    Traceback (most recent call last):
    ...
    TypeError: rows: expected dtype int64, got float32
    """
    check_attention(
        query,
        key,
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
        dropout_p=0.0,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        value_weights=None,
        key_segments=None,
        observe=None,
        backend="auto",
    )
    _check_tensor("rows", rows, _INT64, query)
    if rows.dim() != 1:
        raise ValueError(f"rows: expected one axis of row indices, got shape {_shape(rows)}")


def _check_tensor(name: str, tensor: Any, dtypes: dict[torch.dtype, None], query: Tensor | None) -> None:
    """A dense tensor of one of these dtypes, on the query's device."""
    if not isinstance(tensor, Tensor):
        raise _wrong_type(name, "a tensor", tensor)
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "a nested" if tensor.is_nested else f"layout {_short(tensor.layout)}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {layout}; convert it with to_dense()")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_short(tensor.dtype)}")
    if query is not None and tensor.device != query.device:
        raise ValueError(f"{name}: expected device {query.device} as query, got {tensor.device}")


def _check_heads(name: str, tensor: Any, query: Tensor | None, autocast_dtype: torch.dtype | None) -> None:
    """A (B, H, length, width) tensor, in the query's dtype unless autocast is about to cast both."""
    _check_tensor(name, tensor, _FLOATS if autocast_dtype is None else _AUTOCAST_FLOATS, query)
    if tensor.dim() != 4:
        axes = "(B, H, M, D)" if query is None else "(B, Hk, N, D)" if name == "key" else "(B, Hk, N, Dv)"
        raise ValueError(f"{name}: expected 4 axes {axes}, got shape {_shape(tensor)}")
    if query is not None and autocast_dtype is None and tensor.dtype != query.dtype:
        raise TypeError(f"{name}: expected dtype {_short(query.dtype)} as query, got {_short(tensor.dtype)}")


def _check_query_and_key(query: torch.Size, key: torch.Size) -> None:
    batch, heads, _, width = query
    key_batch, key_heads, _, key_width = key
    if width < 1:
        raise ValueError(f"query: expected head width of at least 1, got {width}")
    if heads < 1:
        raise ValueError(f"query: expected at least 1 head, got {heads}")
    if key_batch != batch:
        raise ValueError(f"key: expected batch size {batch} as in query, got {key_batch}")
    if key_width != width:
        raise ValueError(f"key: expected head width {width} as in query, got {key_width}")
    if key_heads < 1 or heads % key_heads != 0:
        raise ValueError(f"key: expected a number of heads that divides the {heads} of query, got {key_heads}")


def _check_value(value: torch.Size, key: torch.Size) -> None:
    batch, heads, keys, width = value
    key_batch, key_heads, key_count, _ = key
    if batch != key_batch:
        raise ValueError(f"value: expected batch size {key_batch} as in query, got {batch}")
    if heads != key_heads:
        raise ValueError(f"value: expected {key_heads} heads as in key, got {heads}")
    if keys != key_count:
        raise ValueError(f"value: expected {key_count} keys as in key, got {keys}")
    if width < 1:
        raise ValueError(f"value: expected head width of at least 1, got {width}")


def _check_weighting(weighting: Any, scale: Any, query: torch.Size) -> None:
    if not isinstance(weighting, Weighting):
        raise _wrong_type("weighting", EXPECTED_WEIGHTING, weighting)
    if weighting.normalize_qk and scale is None and query[3] == 1:
        raise ValueError(
            "scale: expected a number or a tensor (H,), got None; ln(D), the default, is 0 at head width 1"
        )


def _check_window(window: Any) -> None:
    expected = "None or a pair (left, right) of integers of at least 0 or None (unlimited)"
    if not isinstance(window, (tuple, list)):
        raise _wrong_type("window", expected, window)
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, _INTEGER_TYPES)):
            raise TypeError(f"window: expected {expected}, got {window!r}")
    if len(window) != 2:
        raise ValueError(f"window: expected {expected}, got {window!r}")
    left, right = window
    if (left is not None and not 0 <= left < 2**63) or (right is not None and not 0 <= right < 2**63):
        raise ValueError(f"window: expected {expected}, got {window!r}")


def _check_key_selection(key_lengths: Any, key_mask: Any, query: Tensor, key: torch.Size) -> None:
    batch, _, keys, _ = key
    if key_lengths is not None:
        _check_tensor("key_lengths", key_lengths, _INDEX, query)
        if key_lengths.dim() != 1 or key_lengths.shape[0] != batch:
            raise ValueError(f"key_lengths: expected shape (B,) = ({batch},), got {_shape(key_lengths)}")
    if key_mask is not None:
        _check_tensor("key_mask", key_mask, _BOOL, query)
        if key_mask.dim() != 2 or key_mask.shape[0] != batch or key_mask.shape[1] != keys:
            raise ValueError(f"key_mask: expected shape (B, N) = ({batch}, {keys}), got {_shape(key_mask)}")


def _check_attn_mask(mask: Any, query: Tensor, key: torch.Size, autocast_dtype: torch.dtype | None) -> None:
    dtypes = {torch.bool: None, query.dtype: None, torch.float32: None}
    if autocast_dtype is not None:
        dtypes[autocast_dtype] = None
    _check_tensor("attn_mask", mask, dtypes, query)
    batch, heads, queries, _ = query.shape
    scores = (batch, heads, queries, key[2])
    axes = mask.dim()
    fits = axes <= 4
    if fits:
        for size, whole in zip(mask.shape, scores[4 - axes :], strict=True):
            if size != 1 and size != whole:
                fits = False
    if not fits:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to (B, H, M, N) = {_tuple(scores)}, got {_shape(mask)}"
        )


def _check_per_head(name: str, tensor: Any, query: Tensor) -> None:
    _check_tensor(name, tensor, _FLOATS, query)
    heads = query.shape[1]
    if tensor.dim() != 1 or tensor.shape[0] != heads:
        raise ValueError(f"{name}: expected shape (H,) = ({heads},), got {_shape(tensor)}")


def _check_alibi_slopes(alibi_slopes: Any, query: Tensor) -> None:
    _check_per_head("alibi_slopes", alibi_slopes, query)
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "alibi_slopes: expected no requires_grad, because no backend has that gradient; detach it"
        )


def _check_sinks(sinks: Any, query: Tensor, weighting: Weighting) -> None:
    _check_per_head("sinks", sinks, query)
    if not isinstance(weighting, Softmax) or weighting.reweight is not None:
        raise NotImplementedError(f"sinks: expected a Softmax weighting without reweight, got {weighting}")


def _check_scale(scale: Any, query: Tensor) -> None:
    if isinstance(scale, Tensor):
        _check_per_head("scale", scale, query)
        return
    if isinstance(scale, bool) or not isinstance(scale, _NUMBER_TYPES):
        raise _wrong_type("scale", "None, a finite number or a tensor (H,)", scale)
    if not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(
            f"scale: expected None, a finite number (at most {_LARGEST_SCALE} in size) or a tensor (H,), got {scale}"
        )


def _check_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, _NUMBER_TYPES):
        raise _wrong_type("dropout_p", "a probability in [0, 1)", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _check_documents(cu_seqlens_q: Any, cu_seqlens_k: Any, key_lengths: Any, query: Tensor) -> None:
    for name, offsets, other in (
        ("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k"),
        ("cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q"),
    ):
        if offsets is None:
            raise ValueError(f"{name}: expected int32 offsets, because {other} is given, got None")
        _check_tensor(name, offsets, _INT32, query)
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(f"{name}: expected shape (documents + 1,), got {_shape(offsets)}")
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k: expected {cu_seqlens_q.shape[0]} offsets as in cu_seqlens_q, got {cu_seqlens_k.shape[0]}"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query: expected batch size 1 with packed documents (cu_seqlens_q), got {query.shape[0]}")
    if key_lengths is not None:
        raise ValueError(
            "key_lengths: expected None with packed documents, got a tensor; cu_seqlens_k gives the lengths"
        )


def _check_statistics(observe: Any, value_weights: Any, key_segments: Any, query: Tensor, key: torch.Size) -> None:
    batch, key_heads, keys, _ = key
    if observe is not None and not isinstance(observe, Observe):
        raise _wrong_type("observe", "None or an Observe", observe)
    if value_weights is not None:
        _check_tensor("value_weights", value_weights, _FLOATS, query)
        heads = query.shape[1]
        shape = value_weights.shape
        if len(shape) != 3 or shape[0] != batch or (shape[1] != key_heads and shape[1] != heads) or shape[2] != keys:
            raise ValueError(
                f"value_weights: expected shape (B, Hk, N) = {_tuple((batch, key_heads, keys))} or (B, H, N), "
                f"got {_tuple(shape)}"
            )
    if key_segments is not None:
        _check_tensor("key_segments", key_segments, _INTEGERS, query)
        if key_segments.dim() != 2 or key_segments.shape[0] != batch or key_segments.shape[1] != keys:
            raise ValueError(f"key_segments: expected shape (B, N) = ({batch}, {keys}), got {_shape(key_segments)}")
    _check_pairing("value_weights", value_weights, "weighted_value", observe is not None and observe.weighted_value)
    _check_pairing("key_segments", key_segments, "segments", observe is not None and observe.segments)
    if observe is not None:
        missing = [name for name in observe.requested() if name != "log_normalizer"]
        if missing:
            raise NotImplementedError(
                f"observe: expected log_normalizer, the only statistic of this version, got {', '.join(missing)}"
            )


def _check_pairing(name: str, tensor: Tensor | None, statistic: str, wanted: bool | int) -> None:
    if wanted and tensor is None:
        raise ValueError(f"{name}: expected a tensor, because observe.{statistic} is set, got None")
    if tensor is not None and not wanted:
        raise ValueError(f"{name}: expected None, because observe.{statistic} is not set, got a tensor")


def _refuse_backend(backend: Any) -> None:
    expected = "one of " + ", ".join(BACKENDS)
    if not isinstance(backend, str):
        raise _wrong_type("backend", expected, backend)
    raise ValueError(f"backend: expected {expected}, got {backend!r}")


def _wrong_type(name: str, expected: str, got: Any) -> TypeError:
    kind = type(got)
    # numpy.bool is no bool, and would be called one.
    is_namesake = kind.__module__ != "builtins" and hasattr(builtins, kind.__name__)
    owner = f"{kind.__module__}." if is_namesake else ""
    return TypeError(f"{name}: expected {expected}, got {owner}{kind.__name__}")


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _names(dtypes: dict[torch.dtype, None]) -> str:
    *some, last = map(_short, dtypes)
    return f"{', '.join(some)} or {last}" if some else last


def _tuple(sizes: Any) -> str:
    return "(" + ", ".join(str(size) for size in sizes) + ")"


def _shape(tensor: Tensor) -> str:
    return _tuple(tensor.shape)
