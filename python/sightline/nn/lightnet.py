"""LightNet's attention layer, its gated linear unit, and the block of the two (arXiv 2405.21022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sightline._checks import _AUTOCAST_FLOATS, _FLOATS, _LARGEST_SCALE, _check_tensor, _shape, _short
from sightline._recurrence_checks import _LARGEST_WIDTH
from sightline._size_checks import check_count, check_divisor, check_flag, check_number
from sightline.ops.autocast import autocast_dtype
from sightline.position import grid_positions, md_lrpe
from sightline.recurrence import RecurrenceState, additive_recurrence

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "swish": functional.silu}


class LightNetAttention(nn.Module):
    """The additive linear recurrence as a layer: linear in the length, with a state of constant size.

    With q = SiLU(W_q x), key logits W_k x and values W_v x the output is ``W_o (norm(o) * gate(W_g2 W_g1 x))``: an
    RMSNorm, and a gate of low rank.

    Args:
        embed_dim: width of input and output; the values' heads have width embed_dim / num_heads.
        num_heads: query heads.
        num_key_heads: key and value heads, a divisor of num_heads; num_heads by default.
        key_dim: width of a query and key head; that of the values by default.
        gate_rank: width between the two projections of the gate; that of a head by default.
        gate: "sigmoid", or "swish" as in flash-linear-attention.
        norm_per_head: whether the norm is over each head (True) or over all of embed_dim.
        norm_eps: what the norm adds to the mean square.
        scale: multiplies the recurrence's output.
        causal: whether position t reads the positions up to t or all of them.
        position_axes: axes of MD-LRPE positions, None for no positions.

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: sizes below 1 or that do not divide each other, an unknown gate, or heads wider than the
            recurrence takes: 512 for values and for queries and keys, 256 for those that have positions.

    >>> layer = LightNetAttention(64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    >>> _, state = layer(torch.randn(2, 10, 64), output_final_state=True)
    >>> layer(torch.randn(2, 1, 64), initial_state=state).shape  # the next token
    torch.Size([2, 1, 64])
    """

    GATES = tuple(_GATES)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        key_dim: int | None = None,
        gate_rank: int | None = None,
        gate: str = "sigmoid",
        norm_per_head: bool = True,
        norm_eps: float = 1e-6,
        scale: float = 1.0,
        causal: bool = True,
        position_axes: int | None = None,
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        check_count("embed_dim", embed_dim)
        check_divisor("num_heads", num_heads, "embed_dim", embed_dim)
        check_divisor("num_key_heads", num_key_heads, "num_heads", num_heads)
        doubled_by = None if position_axes is None else "position_axes"
        check_widths("embed_dim", embed_dim, "num_heads", num_heads, key_dim, doubled_by)
        for name, size in (("gate_rank", gate_rank), ("position_axes", position_axes)):
            if size is not None:
                check_count(name, size)
        for name, flag in (("norm_per_head", norm_per_head), ("causal", causal)):
            check_flag(name, flag)
        check_number("norm_eps", norm_eps)
        check_number("scale", scale, -_LARGEST_SCALE)
        if gate not in self.GATES:
            raise ValueError(f"gate: expected one of {', '.join(_GATES)}, got {gate!r}")
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.head_dim = embed_dim // num_heads
        self.key_dim = self.head_dim if key_dim is None else key_dim
        self.gate, self.scale, self.causal, self.position_axes = gate, scale, causal, position_axes
        self.norm_per_head = norm_per_head
        rank = self.head_dim if gate_rank is None else gate_rank
        self.q_proj = nn.Linear(embed_dim, num_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_key_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_key_heads * self.head_dim, bias=False)
        self.g_proj = nn.Sequential(nn.Linear(embed_dim, rank, bias=False), nn.Linear(rank, embed_dim, bias=False))
        self.g_norm = nn.RMSNorm(self.head_dim if norm_per_head else embed_dim, eps=norm_eps)
        self.o_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        initial_state: RecurrenceState | None = None,
        output_final_state: bool = False,
    ) -> Any:
        """(B, N, embed_dim) to the same, with `output_final_state` the pair of it and a `RecurrenceState`.

        `positions` (N, axes) or (B, N, axes) is needed where the layer has several axes of positions; with one the
        default is 0, 1, 2, ..., from 0 also with an `initial_state`: to go on, pass the positions that follow. The
        other arguments are those of `sightline.additive_recurrence`.

        Raises TypeError or ValueError for positions that are missing or of the wrong type or shape, or given to a layer
        without, and for hidden states that are not (B, N, embed_dim) in the weights' dtype (autocast mixes dtypes).
        """
        _check_sequence(hidden, self.q_proj.in_features)
        _check_dtype(hidden, self.q_proj)
        query = functional.silu(self.q_proj(hidden)).unflatten(-1, (self.num_heads, self.key_dim)).transpose(1, 2)
        key = self.k_proj(hidden).unflatten(-1, (self.num_key_heads, self.key_dim)).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, (self.num_key_heads, self.head_dim)).transpose(1, 2)
        gain = None
        if self.position_axes is not None:
            query, key, gain = md_lrpe(query, key, self._positions(positions, hidden))
        elif positions is not None:
            raise ValueError("positions: expected None, because the layer has no position_axes, got a tensor")
        output = additive_recurrence(
            query,
            key,
            value,
            causal=self.causal,
            scale=self.scale,
            key_gain=gain,
            cu_seqlens=cu_seqlens,
            key_mask=key_mask,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
        state = None
        if output_final_state:
            output, state = output
        output = output.transpose(1, 2).to(hidden.dtype)
        output = self.g_norm(output).flatten(2) if self.norm_per_head else self.g_norm(output.flatten(2))
        output = self.o_proj(output * _GATES[self.gate](self.g_proj(hidden)))
        return (output, state) if output_final_state else output

    def _positions(self, positions: Tensor | None, hidden: Tensor) -> Tensor:
        if positions is None:
            if self.position_axes != 1:
                raise ValueError(f"positions: expected a tensor (N, {self.position_axes}), got None")
            return grid_positions(hidden.shape[1], device=hidden.device)
        expected = f"a tensor (N, {self.position_axes}) or (B, N, {self.position_axes})"
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: expected {expected}, got {type(positions).__name__}")
        if positions.dim() not in (2, 3) or positions.shape[-1] != self.position_axes:
            raise ValueError(f"positions: expected {expected}, got shape {tuple(positions.shape)}")
        return positions


class GatedLinearUnit(nn.Module):
    """``W_down (SiLU(W_gate x) * W_up x)``, without biases.

    Takes and returns (..., embed_dim).

    Args:
        embed_dim: width of input and output; W_down is (embed_dim, hidden_dim), the others (hidden_dim, embed_dim).
        hidden_dim: width inside.

    Raises:
        TypeError, ValueError: a width is not a whole number of at least 1; the message names it.

    >>> GatedLinearUnit(8, 24)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_count("embed_dim", embed_dim)
        check_count("hidden_dim", hidden_dim)
        self.embed_dim = embed_dim
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., embed_dim) to the same.

        Raises TypeError or ValueError for anything but that, in the weights' dtype (autocast mixes dtypes).
        """
        _check_tensor("hidden", hidden, _FLOATS, None)
        if hidden.dim() < 1 or hidden.shape[-1] != self.embed_dim:
            raise ValueError(f"hidden: expected shape (..., {self.embed_dim}), got {_shape(hidden)}")
        _check_dtype(hidden, self.gate_proj)
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LightNetBlock(nn.Module):
    """Pre-norm residual block of `LightNetAttention` and `GatedLinearUnit`.

    `hidden_dim` is the width inside the gated linear unit, 8/3 of embed_dim by default; the other arguments are those
    of `LightNetAttention`.

    Raises TypeError or ValueError for what `LightNetAttention` refuses, or a hidden_dim that is no whole number of at
    least 1.

    >>> LightNetBlock(64, num_heads=4)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, hidden_dim: int | None = None, **options: Any) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        # Made before the norm, because it checks what both take.
        attn = LightNetAttention(embed_dim, num_heads, **options)
        eps = options.get("norm_eps", 1e-6)
        self.attn_norm = nn.RMSNorm(embed_dim, eps=eps)
        self.attn = attn
        self.mlp_norm = nn.RMSNorm(embed_dim, eps=eps)
        self.mlp = GatedLinearUnit(embed_dim, -(-8 * embed_dim // 3) if hidden_dim is None else hidden_dim)

    def forward(self, hidden: Tensor, *, output_final_state: bool = False, **arguments: Any) -> Any:
        """(B, N, embed_dim) to the same; arguments and state are those of `LightNetAttention.forward`."""
        # The norm would refuse it first, by no name.
        _check_sequence(hidden, self.embed_dim)
        attended = self.attn(self.attn_norm(hidden), output_final_state=output_final_state, **arguments)
        state = None
        if output_final_state:
            attended, state = attended
        hidden = hidden + attended
        hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return (hidden, state) if output_final_state else hidden


def _check_sequence(hidden: Any, width: int) -> None:
    _check_tensor("hidden", hidden, _FLOATS, None)
    if hidden.dim() != 3 or hidden.shape[2] != width:
        raise ValueError(f"hidden: expected shape (B, N, {width}), got {_shape(hidden)}")


def _check_dtype(hidden: Tensor, projection: nn.Module) -> None:
    """The dtype of the weights, where it is they that the input meets: neither quantized nor wrapped nor hooked."""
    if (
        type(projection) is not nn.Linear
        or type(projection.weight) is not nn.Parameter
        or projection._forward_pre_hooks
    ):
        return
    dtype = projection.weight.dtype
    mixed = autocast_dtype(hidden) is not None and dtype in _AUTOCAST_FLOATS
    if hidden.dtype != dtype and not mixed:
        raise TypeError(f"hidden: expected dtype {_short(dtype)} as the weights, got {_short(hidden.dtype)}")


def check_widths(
    whole_name: str, whole: int, heads_name: str, heads: int, key_dim: Any, doubled_by: str | None
) -> None:
    """Widths of heads that the recurrence takes; `doubled_by` is the option that doubles that of queries and keys."""
    if whole > heads * _LARGEST_WIDTH:
        raise ValueError(
            f"{whole_name}: expected at most {_LARGEST_WIDTH} for each of {heads_name} = {heads}, got {whole}"
        )
    width = whole // heads if key_dim is None else key_dim
    check_count("key_dim", width)
    largest, reason = _LARGEST_WIDTH, ""
    if doubled_by is not None:
        largest, reason = largest // 2, f", for {doubled_by} doubles it"
    if width > largest:
        default = ", that of a value" if key_dim is None else ""
        raise ValueError(f"key_dim: expected at most {largest}{reason}, got {width}{default}")
