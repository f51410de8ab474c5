"""The mask function registered as "sightline": transformers' description of a mask, kept as a description.

transformers describes a mask by a function of (batch, head, query, key) indices, made from a few building blocks, and
a padding mask (B, N). Where the function is exactly one whose visibility `sightline.attention` computes from lengths,
window and documents, it is never evaluated. Every other pattern becomes a boolean mask (B, 1, M, N) that is complete
by itself. Under torch.compile closures cannot be read, so that there windows and packed documents become masks too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from sightline.hf.visibility import Visibility

MaskFunction = Callable[..., Any]

# Models whose layers append columns of a float mask of their own to the mask, for keys that they make themselves.
_WANTS_A_FLOAT_MASK = frozenset({"deepseek_v4"})


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _code_of_closure(name: str, *arguments: Any) -> Any:
    """The code of what a building block of transformers returns; None where this version does not have the block."""
    build = getattr(masking_utils, name, None)
    return None if build is None else _code(build(*arguments))


# Closures are told apart by their code, and read through their cells.
_ONE = torch.zeros(1, 1, dtype=torch.long)
_AND = _code_of_closure("and_masks", masking_utils.causal_mask_function)
_SLIDING = _code_of_closure("sliding_window_overlay", 1)
_SLIDING_BIDIRECTIONAL = _code_of_closure("sliding_window_bidirectional_overlay", 1)
_PACKED = _code_of_closure("packed_sequence_mask_function", _ONE)
_REMAPPED = _code_of_closure("remap_positions_for_packed_sequence", masking_utils.causal_mask_function, _ONE)


@dataclass(frozen=True)
class _Pattern:
    causal: bool
    window: tuple[int | None, int | None] | None = None
    # (B, N), equal numbers where tokens share a document.
    documents: Tensor | None = None


def _cells(function: Any, code: Any) -> dict[str, Any] | None:
    """The captured variables of `function` where its code is `code`; None where it is not, or under a compiler."""
    if torch.compiler.is_compiling() or code is None or _code(function) is not code:
        return None
    cells = function.__closure__
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _parts(function: Any) -> tuple[Any, Any] | None:
    cells = _cells(function, _AND)
    if cells is None or len(cells["mask_functions"]) != 2:
        return None
    first, second = cells["mask_functions"]
    return first, second


def _plain_pattern(function: MaskFunction) -> _Pattern | None:
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern(causal=False)
    parts = _parts(function)
    if parts is None:
        return None
    overlay, base = parts
    if base is masking_utils.causal_mask_function:
        cells = _cells(overlay, _SLIDING)
        # kv > q - w: the row itself and w - 1 keys before it.
        return None if cells is None else _Pattern(causal=True, window=(cells["sliding_window"] - 1, 0))
    if base is masking_utils.bidirectional_mask_function:
        cells = _cells(overlay, _SLIDING_BIDIRECTIONAL)
        if cells is not None:
            return _Pattern(causal=False, window=(cells["sliding_window"], cells["sliding_window"]))
    return None


def _pattern(function: MaskFunction) -> _Pattern | None:
    """What `function` computes where it is one of the patterns that need no mask, else None."""
    plain = _plain_pattern(function)
    if plain is not None:
        return plain
    parts = _parts(function)
    if parts is None:
        return None
    packed, remapped = _cells(parts[0], _PACKED), _cells(parts[1], _REMAPPED)
    if packed is None or remapped is None:
        return None
    inner = _plain_pattern(remapped["mask_function"])
    if inner is None:
        return None
    # Positions inside a document grow by one, so that their differences are those of the indices.
    return _Pattern(inner.causal, inner.window, packed["packed_sequence_mask"])


def _document_offsets(documents: Tensor, batch: int) -> Tensor:
    """(documents + 1,) int32: where a new document begins in the batch entries laid end to end, and the end."""
    begins = torch.ones((batch, documents.shape[1]), dtype=torch.bool, device=documents.device)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    offsets = torch.nonzero(begins.flatten()).flatten()
    return torch.nn.functional.pad(offsets, (0, 1), value=begins.numel()).to(torch.int32)


def _is_readable(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: off the CPU that waits for the device, and a tracer has none."""
    return tensor.device.type == "cpu" and not masking_utils.is_tracing(tensor)


def _key_mask(padding: Tensor | None, first: int, keys: int, needed: Any) -> Tensor | None:
    """The padding mask of keys `first` to `first + keys`, None where all of the first `needed` of them take part."""
    if padding is None:
        return None
    covers = isinstance(needed, int) and padding.shape[1] >= first + needed
    if covers and _is_readable(padding) and bool(padding[:, first : first + needed].all()):
        return None
    mask = padding[:, first : first + keys]
    return mask if mask.shape[1] == keys else torch.nn.functional.pad(mask, (0, keys - mask.shape[1]))


def sightline_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visibility | Tensor:
    """The mask of one forward call, for transformers' `AttentionMaskInterface`.

    Args:
        batch_size, q_length, kv_length: B, M, N.
        q_offset, kv_offset: positions of the first query and of the first key; a static cache gives a tensor.
        mask_function: transformers' pattern, a function of (batch, head, query, key) indices.
        attention_mask: padding (B, L) bool, True where a token takes part, or a `Visibility` made earlier.
        use_vmap: the pattern contains a function of the user's.

    Returns:
        A `Visibility` for causal, bidirectional, windowed and packed patterns; else bool (B, 1, M, N), True: visible;
        or a float mask, for a model that adds to it.
        Never None: transformers' other attention functions take None for torch's top-left causality.

    Raises:
        ValueError: a mask of three axes.

    >>> sightline_mask(2, 3, 5, q_offset=2).causal
    True
    """
    if isinstance(attention_mask, Visibility):
        return attention_mask
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected padding (B, N) or a mask (B, 1 or H, M, N), got shape "
            f"{tuple(attention_mask.shape)}"
        )
    if getattr(kwargs.get("config"), "model_type", None) in _WANTS_A_FLOAT_MASK:
        return masking_utils.eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            dtype=kwargs["dtype"],
            use_vmap=use_vmap,
            device=device,
        )
    is_static = isinstance(q_offset, Tensor)
    offset: Any = int(q_offset) if isinstance(q_offset, Tensor) and _is_readable(q_offset) else q_offset
    # Row i sits at position offset + i, so keys past the last row's position are unused slots of a cache.
    length = offset + q_length - kv_offset
    pattern = None if use_vmap else _pattern(mask_function)
    if pattern is None or not _is_aligned(pattern, length, q_length, kv_length):
        dense = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert dense is not None
        return dense

    key_lengths = None
    if pattern.causal and isinstance(length, Tensor):
        key_lengths = length.to(torch.int64).expand(batch_size)
    elif pattern.causal and (is_static or length != kv_length):
        # Also for the last slot of a static cache, so that a compiled forward meets the same arguments as before.
        key_lengths = torch.full((batch_size,), length, dtype=torch.int64, device=device)
    return Visibility(
        batch=batch_size,
        queries=q_length,
        keys=kv_length,
        causal=pattern.causal,
        window=pattern.window,
        key_lengths=key_lengths,
        key_mask=_key_mask(attention_mask, kv_offset, kv_length, length if pattern.causal else kv_length),
        document_offsets=None if pattern.documents is None else _document_offsets(pattern.documents, batch_size),
        device=device,
    )


def _is_aligned(pattern: _Pattern, length: Any, queries: int, keys: int) -> bool:
    """Whether the last row stands at the last of `length` valid keys, which `sightline.attention` takes for granted.

    Without causality and window it does not matter where rows stand, and every slot is visible that padding leaves.
    """
    if pattern.documents is not None:
        return not isinstance(length, Tensor) and length == keys == queries
    if pattern.causal:
        return isinstance(length, Tensor) or 0 < length <= keys
    return pattern.window is None or (not isinstance(length, Tensor) and length == keys)
