"""From the arguments of the operators to what kernels are given: pointers with strides, options, and the variant.

Nothing here reads a number from the device: lengths, offsets and seeds stay where they are, so that a call never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.triton.compat import interpretable
from sightline.triton.problem import Heads, Mask, Problem, Variant
from sightline.weighting import WEIGHTINGS

LARGEST_WIDTH = 256
_LARGEST_INDEX = 2**31 - 65536 - 1  # FIRST_UNSEEN of rows.py and a tile stay beyond it
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_FUNCTIONS = tuple(WEIGHTINGS)
_LARGEST_WHOLE_POWER = 64


@dataclass(frozen=True)
class Options:
    """The options of `sightline::attention`, in the order of its schema."""

    key_lengths: Tensor | None
    key_mask: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale_per_head: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    causal: bool
    window_left: int
    window_right: int
    scale: float
    dropout_p: float
    weight_function: int
    length_scale: bool
    normalize_qk: bool
    softcap: float
    reweight_power: float
    reweight_offset: float
    reweight_exempt_rows: int

    @property
    def reweights(self) -> bool:
        return self.reweight_power > 0.0

    @property
    def needs_count(self) -> bool:
        return self.length_scale or self.reweights


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor as a kernel reads it: a last axis without gaps."""
    tensor = interpretable(tensor.detach())
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def heads_view(tensor: Tensor) -> Heads:
    return Heads(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2))


def mask_view(mask: Tensor | None) -> Mask:
    """Pointer and strides of a tensor that broadcasts to (B, H, M, N)."""
    if mask is None:
        return Mask(None, 0, 0, 0, 0)
    mask = mask.detach()
    data = mask.view(torch.uint8) if mask.dtype == torch.bool else interpretable(mask)
    return Mask(data, *(0 if size == 1 else stride for size, stride in zip(mask.shape, data.stride(), strict=True)))


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
    # A raw call of the operator must not read out of bounds; the public function has checked more, and says it better.
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    expectations = [
        (query.dtype in _DTYPES, "query: expected float32, float16 or bfloat16"),
        (query.dtype == key.dtype == value.dtype, "key and value: expected the dtype of query"),
        (key.shape[0] == value.shape[0] == batch, "key and value: expected the batch of query"),
        (key.shape[3] == width, "key: expected the width of query"),
        (value.shape[1:3] == key.shape[1:3], "value: expected the heads and rows of key"),
        (key_heads > 0 and heads % key_heads == 0, "query: expected a multiple of the key heads"),
        (max(width, value.shape[3]) <= LARGEST_WIDTH, f"query and value: expected widths of at most {LARGEST_WIDTH}"),
        (max(heads // max(key_heads, 1) * queries, keys) <= _LARGEST_INDEX, "query and key: expected fewer rows"),
    ]
    mask = options.key_mask
    if mask is not None:
        expectations.append((mask.shape == (batch, keys), "key_mask: expected bool (B, N)"))
    mask = options.attn_mask
    if mask is not None:
        fits = mask.dim() == 4 and all(
            size in (1, whole) for size, whole in zip(mask.shape, (batch, heads, queries, keys), strict=True)
        )
        expectations.append((fits, "attn_mask: expected a shape that broadcasts to (B, H, M, N)"))
    if options.key_lengths is not None:
        expectations.append((options.key_lengths.shape == (batch,), "key_lengths: expected shape (B,)"))
    for name in ("alibi_slopes", "sinks", "scale_per_head"):
        vector = getattr(options, name)
        expectations.append((vector is None or vector.shape == (heads,), f"{name}: expected shape (H,)"))
    for tensor in (key, value, *vars(options).values()):
        if isinstance(tensor, Tensor):
            expectations.append((tensor.device == query.device, f"query: expected device {tensor.device}"))
    for holds, message in expectations:
        if not holds:
            raise RuntimeError(message)


def _per_head(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().to(torch.float32).contiguous()


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _key_mask_prefix(options: Options) -> Tensor | None:
    counts = options.needs_count or options.sinks is not None
    if options.key_mask is None or options.attn_mask is not None or not counts:
        return None
    return torch.nn.functional.pad(options.key_mask.cumsum(1, dtype=torch.int32), (1, 0))


def _dropout(options: Options) -> tuple[Tensor | None, int, float]:
    if options.dropout_p <= 0.0:
        return None, 0, 1.0
    if options.dropout_seed is None or options.dropout_p >= 1.0:
        raise RuntimeError("dropout_p: expected a number in [0, 1) and an int64 dropout_seed of one element")
    return options.dropout_seed, int(options.dropout_p * 2**32), 1.0 / (1.0 - options.dropout_p)


def make_problem(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Problem:
    """The runtime half of a launch; n_i of attn_mask and norms are left to the caller, who has kernels for them."""
    _check_sizes(query, key, value, options)
    query, key, value = (with_contiguous_rows(tensor) for tensor in (query, key, value))
    key_mask = None if options.key_mask is None else options.key_mask.view(torch.uint8)
    documents = 0 if options.cu_seqlens_q is None else options.cu_seqlens_q.shape[0] - 1
    # No window reaches further than this, and no position plus a window overflows.
    furthest = query.shape[2] + key.shape[2]
    seed, threshold, dropout_scale = _dropout(options)
    return Problem(
        query=heads_view(query),
        key=heads_view(key),
        value=heads_view(value),
        heads=query.shape[1],
        key_heads=key.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        scale=float(options.scale),
        scale_per_head=_per_head(options.scale_per_head),
        key_lengths=None if options.key_lengths is None else options.key_lengths.contiguous(),
        key_mask=key_mask,
        key_mask_batch_stride=0 if key_mask is None else key_mask.stride(0),
        key_mask_key_stride=0 if key_mask is None else key_mask.stride(1),
        visible_prefix=_key_mask_prefix(options),
        visible_counts=None,
        inverse_key_norms=None,
        mask=mask_view(options.attn_mask),
        alibi_slopes=_per_head(options.alibi_slopes),
        sinks=_per_head(options.sinks),
        cu_seqlens_q=_offsets(options.cu_seqlens_q),
        cu_seqlens_k=_offsets(options.cu_seqlens_k),
        documents=documents,
        search_steps=documents.bit_length(),
        window_left=min(options.window_left, furthest),
        window_right=min(options.window_right, furthest),
        softcap=float(options.softcap),
        power=float(options.reweight_power),
        offset=float(options.reweight_offset),
        exempt_rows=float(options.reweight_exempt_rows),
        dropout_seed=seed,
        dropout_threshold=threshold,
        dropout_scale=dropout_scale,
    )


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def make_variant(query: Tensor, value: Tensor, options: Options) -> Variant:
    """The variant of these arguments; tiles, packing and what is saved are chosen per kernel."""
    power = options.reweight_power
    whole = power == int(power) and power <= _LARGEST_WHOLE_POWER
    mask = options.attn_mask
    return Variant(
        head_width=query.shape[3],
        value_width=value.shape[3],
        block_width=_block(query.shape[3]),
        block_value_width=_block(value.shape[3]),
        row_tile=0,
        key_tile=0,
        dtype=_DTYPES[query.dtype],
        function=_FUNCTIONS[options.weight_function],
        length_scale=options.length_scale,
        normalize_qk=options.normalize_qk,
        causal=options.causal,
        window_left=options.window_left >= 0,
        window_right=options.window_right >= 0,
        documents=options.cu_seqlens_q is not None,
        masked_everywhere=options.key_mask is not None or mask is not None,
        bool_mask=mask is not None and mask.dtype == torch.bool,
        softcap=options.softcap > 0.0,
        reweight=options.reweights,
        whole_power=int(power) if whole else 0,
        dropout=options.dropout_p > 0.0,
        packed_heads=False,
        saves=False,
        skips=False,
        descriptors=False,
        specialized=False,
        safe=False,
    )


def split_arguments(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Options, tuple[Any, ...]]:
    """Arguments of `attention`: query, key and value; the options; what stands after them."""
    return arguments[:3], Options(*arguments[3:12], *arguments[14:26]), arguments[26:]


def split_backward_arguments(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Options, tuple[Any, ...]]:
    """Arguments of `attention_backward`: the leading tensors; the options; which gradients are wanted."""
    return arguments[:8], Options(*arguments[8:29]), arguments[29:]
