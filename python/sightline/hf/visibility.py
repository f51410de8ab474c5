"""Which keys the rows of one forward call see: what sightline's mask function gives transformers instead of a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.reference.visibility import visible_keys


@dataclass(frozen=True, eq=False)
class Visibility:
    """The visible keys of a forward call in O(N) memory. It stands for a boolean mask (B, 1, M, N), True: visible.

    transformers' models hand their mask from the mask function to the attention function without looking at it, most
    of the time. The few that do look get the mask that this stands for: indexing, operators, tensor methods and torch
    functions compute with `dense()`.

    batch, queries, keys: B, M, N. causal, window, key_lengths, key_mask: as in `sightline.attention`.
    document_offsets: (documents + 1,) int32, where the documents of the batch entries, laid end to end, begin and end.

    >>> Visibility(batch=2, queries=3, keys=3, causal=True, key_mask=torch.ones(2, 3, dtype=torch.bool)).shape
    torch.Size([2, 1, 3, 3])
    """

    batch: int
    queries: int
    keys: int
    causal: bool
    window: tuple[int | None, int | None] | None = None
    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    document_offsets: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> torch.Size:
        """(B, 1, M, N)."""
        return torch.Size((self.batch, 1, self.queries, self.keys))

    @property
    def ndim(self) -> int:
        """4, as that of a mask that is complete: transformers neither rebuilds nor expands it."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """torch.bool."""
        return torch.bool

    def dim(self) -> int:
        """The number of axes, 4."""
        return 4

    def contiguous(self) -> Visibility:
        """Itself: there is no memory to rearrange."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A copy on another device; the dense mask where another dtype is asked for."""
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking, _ = parsed
        if dtype is not None and dtype != torch.bool:
            return self.dense().to(*args, **kwargs)
        if device is None:
            return self

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Visibility(
            self.batch,
            self.queries,
            self.keys,
            self.causal,
            self.window,
            moved(self.key_lengths),
            moved(self.key_mask),
            moved(self.document_offsets),
            device,
        )

    def dense(self) -> Tensor:
        """The boolean mask (B, 1, M, N) that this stands for."""
        shape = self.shape
        rows = torch.arange(self.queries, device=self.device)
        keys = self.keys
        if self.document_offsets is not None:
            rows, keys = torch.arange(self.batch * self.queries, device=self.device), self.batch * keys
        visible, _ = visible_keys(
            rows,
            rows.numel(),
            keys,
            causal=self.causal,
            window=self.window,
            key_lengths=self.key_lengths,
            key_mask=self.key_mask,
            attn_mask=None,
            cu_seqlens_q=self.document_offsets,
            cu_seqlens_k=self.document_offsets,
        )
        if self.document_offsets is not None:
            entries = visible.view(self.batch, self.queries, self.batch, self.keys)
            return entries.diagonal(dim1=0, dim2=2).movedim(-1, 0)[:, None]
        return visible.expand(shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __len__(self) -> int:
        return self.batch

    def __bool__(self) -> bool:
        raise TypeError("attention_mask: expected a question of one entry, got one of a whole mask (`is None`?)")

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def dense(value: Any) -> Any:
            if isinstance(value, Visibility):
                return value.dense()
            if isinstance(value, (list, tuple)):
                return type(value)(dense(item) for item in value)
            return value

        return function(*dense(tuple(args)), **{name: dense(value) for name, value in (kwargs or {}).items()})


def _dense_operator(name: str) -> Any:
    def operator(self: Visibility, other: Any) -> Any:
        return getattr(self.dense(), name)(other.dense() if isinstance(other, Visibility) else other)

    operator.__name__ = name
    return operator


for _symbol in ("and", "or", "xor", "add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge"):
    for _side in ("", "r"):
        if _side == "" or hasattr(Tensor, f"__r{_symbol}__"):
            setattr(Visibility, f"__{_side}{_symbol}__", _dense_operator(f"__{_side}{_symbol}__"))
