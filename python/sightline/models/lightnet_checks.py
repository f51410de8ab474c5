"""What LightNet's models take, checked in the names that their caller gave, and what follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline._checks import _shape, _short, _tuple, _wrong_type
from sightline.models.lightnet_cache import RecurrenceCache


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise _wrong_type(name, "a tensor", tensor)


def check_tokens(input_ids: Any, inputs_embeds: Any, width: int) -> tuple[int, int]:
    """Batch size and length of the one that is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: expected either input_ids or inputs_embeds, got both or none")
    name, tensor = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    _check_tensor(name, tensor)
    if inputs_embeds is None:
        if tensor.dim() != 2:
            raise ValueError(f"input_ids: expected shape (B, N), got {tuple(tensor.shape)}")
    elif tensor.dim() != 3 or tensor.shape[2] != width:
        raise ValueError(f"inputs_embeds: expected shape (B, N, {width}), got {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def check_cache(cache: Any, config: Any, batch: int | None = None, dtype: torch.dtype | None = None) -> None:
    """A cache, where there is one, has the states of such a model.

    They are of `batch` entries and belong to hidden states of this dtype, where that is known.
    """
    if cache is None:
        return
    if not isinstance(cache, RecurrenceCache):
        raise TypeError(
            f"past_key_values: expected a RecurrenceCache, got {type(cache).__name__}; the other caches of "
            "transformers hold keys and values"
        )
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"past_key_values: expected {config.num_hidden_layers} layers, got {len(cache.layers)}")
    width = config.key_dim * (2 if config.position_encoding == "lrpe" else 1)
    for state in (cache.layer(index).state for index in range(len(cache.layers))):
        if state is None:
            continue
        entries, heads = state.memory.shape[:2]
        if batch is not None and entries != batch:
            raise ValueError(f"past_key_values: expected states of {batch} batch entries, got {entries}")
        if heads != config.num_key_value_heads:
            raise ValueError(f"past_key_values: expected states of {config.num_key_value_heads} key heads, got {heads}")
        sizes = (entries, heads, width, config.hidden_size // config.num_attention_heads)
        for name, symbols, axes in (("log_normalizer", "(B, Hk, Dk)", 3), ("memory", "(B, Hk, Dk, Dv)", 4)):
            tensor, shape = getattr(state, name), sizes[:axes]
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            if dtype is not None and tensor.dtype != wide:
                raise TypeError(f"past_key_values: expected states in {_short(wide)}, got {_short(tensor.dtype)}")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"past_key_values: expected {name} of shape {symbols} = {_tuple(shape)}, got {_shape(tensor)}"
                )


def check_positions(position_ids: Any, batch: int, length: int) -> None:
    """Positions, where there are some, are (B, N), or one row for all."""
    if position_ids is None:
        return
    _check_tensor("position_ids", position_ids)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids: expected shape (B, N) = ({batch}, {length}), got {tuple(position_ids.shape)}")


def key_mask_of(attention_mask: Tensor | None, batch: int, seen: int, length: int) -> Tensor | None:
    """The mask of these tokens: what came before has found its way into the state already."""
    if attention_mask is None:
        return None
    _check_tensor("attention_mask", attention_mask)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask: expected shape (B, N) with B = {batch}, got {tuple(attention_mask.shape)}; a recurrence "
            "has no mask per pair of tokens"
        )
    if attention_mask.shape[1] not in (length, seen + length):
        raise ValueError(
            f"attention_mask: expected {length} tokens, or {seen + length} with those of the cache, "
            f"got {attention_mask.shape[1]}"
        )
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


def documents_of(
    batch: int, length: int, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Offsets (documents + 1,) int32 in the rows laid end to end, None where every row is one document."""
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q: expected one row of packed documents, got {batch}")
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None with packed documents (cu_seq_lens_q), got a tensor")
        _check_tensor("cu_seq_lens_q", cu_seq_lens)
        if cu_seq_lens.dim() != 1 or cu_seq_lens.shape[0] < 1:
            raise ValueError(f"cu_seq_lens_q: expected shape (documents + 1,), got {tuple(cu_seq_lens.shape)}")
        if cu_seq_lens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seq_lens_q: expected dtype int32, got {_short(cu_seq_lens.dtype)}")
        # Clamped, because an int64 offset far beyond the end would wrap.
        return cu_seq_lens.clamp(0, length).to(torch.int32)
    if attention_mask is not None or position_ids is None or length < 2:
        return None
    begins = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    places = torch.arange(batch * length, device=position_ids.device)
    if torch.compiler.is_compiling():
        # A graph's shapes do not depend on numbers: one offset for every token, and equal ones enclose no document.
        starts = torch.where(begins.expand(batch, length).flatten(), places, 0).cummax(0).values
    elif begins[:, 1:].any():
        starts = places[begins.expand(batch, length).flatten()]
    else:
        return None
    return torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)
