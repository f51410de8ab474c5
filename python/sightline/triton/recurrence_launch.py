"""The operators `sightline::additive_recurrence_triton` and its backward: allocate, cut into chunks, launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sightline.triton.arguments import heads_view, with_contiguous_rows
from sightline.triton.compat import INTERPRETED, launch_options, launching_on, sixteen_bit_precision
from sightline.triton.problem import Heads
from sightline.triton.recurrence_arguments import check_call, check_gradients
from sightline.triton.recurrence_backward import (
    Gradients,
    query_gradients,
    scan_back,
    sum_back,
)
from sightline.triton.recurrence_chunk import RecurrenceProblem, RecurrenceVariant
from sightline.triton.recurrence_forward import recurrence_outputs, scan_chunks, sum_chunks
from sightline.triton.recurrence_key_gradients import key_gradients, value_gradients


class _Tile(NamedTuple):
    """Rows of a chunk, and the most channels and value columns of a tile: what a program holds without spilling."""

    rows: int
    channels: int
    columns: int


# By operator and whether the inputs are float32, whose products take the multiply-add units and more registers.
_TILES = {
    ("forward", False): _Tile(64, 64, 64),
    ("forward", True): _Tile(32, 32, 64),
    ("backward", False): _Tile(32, 32, 32),
    ("backward", True): _Tile(32, 32, 32),
}
_WARPS = 8
_NO_HEADS = Heads(None, 0, 0, 0)


def _block(width: int, most: int) -> int:
    """Columns of a tile: a power of two from 16, the least of a product."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def _writable(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """(B, H, N, W) as a view of (B, N, H, W) memory that a kernel can write; 0 where no chunk does."""
    batch, heads, rows, width = shape
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float32
    return like.new_zeros((batch, rows, heads, width), dtype=dtype).transpose(1, 2)


class _Call:
    """One call of either operator: the problem, its chunks, and the states before each."""

    def __init__(self, operator: str, arguments: tuple[Any, ...]) -> None:
        query, key, value, key_gain, key_mask, cu_seqlens, self.z, self.memory, causal, scale = arguments
        check_call(*arguments[:8])
        self.query, self.key, self.value, self.key_gain = query, key, value, key_gain
        self.device, self.dtype = query.device, query.dtype
        batch, heads, self.length, self.width = query.shape
        self.key_heads, self.value_width = key.shape[1], value.shape[3]
        tile = _TILES[operator, query.dtype == torch.float32]
        precision = "ieee" if query.dtype == torch.float32 else sixteen_bit_precision()
        self.variant = RecurrenceVariant(
            self.width,
            self.value_width,
            tile.rows,
            _block(self.width, tile.channels),
            _block(self.value_width, tile.columns),
            precision,
            precision == "tf32" and query.dtype == torch.float16,
            causal,
            cu_seqlens is not None,
            key_gain is not None,
            key_mask is not None,
        )
        sequences, firsts, rows, bounds = self._chunks(batch, cu_seqlens)
        self.chunks, self.sequences = sequences.shape[0], bounds.shape[0] - 1
        self.channel_tiles = -(-self.width // self.variant.block_width)
        self.column_tiles = -(-self.value_width // self.variant.block_value_width)
        if self.z is not None:
            self.z, self.memory = self.z.contiguous(), self.memory.contiguous()
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        self.problem = RecurrenceProblem(
            heads_view(with_contiguous_rows(query)),
            heads_view(with_contiguous_rows(key)),
            heads_view(with_contiguous_rows(value)),
            _NO_HEADS if key_gain is None else heads_view(with_contiguous_rows(key_gain)),
            mask,
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(1),
            self.key_heads,
            heads // self.key_heads,
            self.value_width,
            scale,
            sequences,
            firsts,
            rows,
            bounds,
            self.fresh(self.chunks, self.key_heads, self.width),
            self.fresh(self.chunks, self.key_heads, self.width, self.value_width),
            self.fresh(self.sequences, self.key_heads, self.width),
            self.fresh(self.sequences, self.key_heads, self.width, self.value_width),
            self.fresh(self.sequences, self.key_heads, self.width),
            self.fresh(self.sequences, self.key_heads, self.width),
        )

    def fresh(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _chunks(self, batch: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sequence, first row and number of rows of every chunk, and the first chunk of every sequence.

        The number of chunks follows from the shapes alone; documents leave some of them without rows.
        """
        device, size = self.device, self.variant.rows
        if cu_seqlens is None:
            per_sequence = -(-self.length // size)
            index = torch.arange(batch * per_sequence, device=device)
            sequence = index // max(per_sequence, 1)
            first = index % max(per_sequence, 1) * size
            bounds = torch.arange(batch + 1, device=device) * per_sequence
            return sequence, first, (self.length - first).clamp(max=size), bounds
        cuts = cu_seqlens.long().clamp(0, self.length).cummax(0).values
        per_document = (cuts.diff() + size - 1) // size
        bounds = torch.cat([cuts.new_zeros(1), per_document.cumsum(0)])
        documents = cuts.shape[0] - 1
        index = torch.arange(-(-self.length // size) + documents if documents else 0, device=device)
        exists = index < bounds[-1]
        sequence = torch.searchsorted(bounds, index, right=True).sub(1).clamp(0, max(documents - 1, 0))
        first = cuts[sequence] + (index - bounds[sequence]) * size
        rows = torch.where(exists, (cuts[sequence + 1] - first).clamp(0, size), 0)
        return sequence, torch.where(exists, first, 0), rows, bounds

    def launch(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any) -> None:
        if min(grid) > 0:
            kernel[grid](self.problem, *arguments, self.variant, **launch_options(_WARPS))

    def compute_states(self) -> None:
        """The states before every chunk, and the final ones."""
        normalizers = self.fresh(self.chunks, self.key_heads, self.width)
        tiles = self.channel_tiles * self.column_tiles
        self.launch(sum_chunks, (self.chunks, self.key_heads, tiles), normalizers)
        self.launch(scan_chunks, (self.sequences, self.key_heads, tiles), normalizers, self.z, self.memory)


def additive_recurrence(*arguments: Any) -> tuple[Tensor, ...]:
    """`sightline::additive_recurrence_triton`."""
    call = _Call("forward", arguments[:-1])
    query = call.query
    with launching_on(call.device):
        call.compute_states()
        output = _writable(query, (*query.shape[:3], call.value_width), call.dtype)
        call.launch(recurrence_outputs, (call.chunks, query.shape[1], call.column_tiles), heads_view(output))
    output = _in_order(output, call.dtype)
    if not arguments[-1]:
        return output, call.fresh(0), call.fresh(0)
    return output, call.problem.final_log_normalizer, call.problem.final_state


def _in_order(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in its dtype, in the memory order that the operators promise."""
    return tensor.transpose(1, 2).to(dtype).transpose(1, 2)


def additive_recurrence_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`sightline::additive_recurrence_triton_backward`."""
    grad_output, grad_log_normalizer, grad_memory = arguments[:3]
    call = _Call("backward", arguments[3:-2])
    needs_gain, needs_state = arguments[-2:]
    shape = (*call.query.shape[:3], call.value_width)
    check_gradients(arguments[:3], shape, tuple(call.problem.final_state.shape), call.query)
    final_z, final_state = call.problem.final_log_normalizer, call.problem.final_state
    tiles = call.channel_tiles * call.column_tiles
    key_gain = call.key_gain
    with launching_on(call.device):
        call.compute_states()
        grad_query = _writable(call.query, call.query.shape, call.dtype)
        grad_key = _writable(call.key, call.key.shape, call.dtype)
        grad_value = _writable(call.value, call.value.shape, call.dtype)
        grad_gain = _writable(key_gain, key_gain.shape, key_gain.dtype) if key_gain is not None and needs_gain else None
        grad_state = torch.zeros_like(final_state) if grad_memory is None else grad_memory.contiguous()
        response = torch.zeros_like(final_z) if grad_log_normalizer is None else grad_log_normalizer
        gradients = Gradients(
            heads_view(with_contiguous_rows(grad_output)),
            heads_view(_writable(call.key, call.key.shape, torch.float32)),
            call.fresh(call.chunks, call.key_heads, call.width),
            torch.empty_like(call.problem.states),
            torch.empty_like(final_z),
            torch.empty_like(final_state),
        )
        channel_grid = (call.chunks, call.key_heads, call.channel_tiles)
        call.launch(query_gradients, channel_grid, gradients, heads_view(grad_query))
        call.launch(sum_back, (call.chunks, call.key_heads, tiles), gradients)
        # r after the last row: what z receives, less <G, S>.
        response = (response - (grad_state * final_state).sum(-1)).contiguous()
        call.launch(scan_back, (call.sequences, call.key_heads, tiles), gradients, grad_state, response)
        if not call.variant.causal:
            # Every row reads the final state, so r is one for all and follows from the finished G.
            given = 0.0 if grad_log_normalizer is None else grad_log_normalizer
            gradients.first_response.copy_(given - (gradients.first_state_gradient * final_state).sum(-1))
        gain_view = _NO_HEADS if grad_gain is None else heads_view(grad_gain)
        call.launch(key_gradients, channel_grid, gradients, heads_view(grad_key), gain_view)
        call.launch(
            value_gradients, (call.chunks, call.key_heads, call.column_tiles), gradients, heads_view(grad_value)
        )
    results = [_in_order(tensor, call.dtype) for tensor in (grad_query, grad_key, grad_value)]
    results.append(call.fresh(0) if grad_gain is None else _in_order(grad_gain, key_gain.dtype))
    return (*results, *(_initial_gradients(call, gradients) if needs_state else (call.fresh(0), call.fresh(0))))


def _initial_gradients(call: _Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """G and r before the first row are what the initial state receives, in units of its own normaliser."""
    if call.z is None:
        return call.fresh(0), call.fresh(0)
    received, response = gradients.first_state_gradient, gradients.first_response
    if not call.variant.causal:
        # Of the state at the end, whose share in it is exp(z_in - z).
        final = call.problem.final_log_normalizer
        share = torch.where(call.z == final, 1.0, (call.z - final).exp())
        received, response = share.unsqueeze(-1) * received, share * response
    bounds = call.problem.sequence_chunks
    unused = (call.z == -torch.inf) & (bounds.diff() > 0)[:, None, None]
    response = response + (call.memory * received).sum(-1)
    return response.masked_fill(unused, 0.0), received.masked_fill(unused.unsqueeze(-1), 0.0)
