"""The operators `sightline::attention_triton` and its backward: allocate, choose tiles, launch."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sightline.triton.arguments import (
    heads_view,
    make_problem,
    make_variant,
    mask_view,
    split_arguments,
    split_backward_arguments,
    with_contiguous_rows,
)
from sightline.triton.backward import key_gradients, query_gradients
from sightline.triton.compat import (
    interpretable,
    launch_options,
    launching_on,
    multiprocessors,
    with_scratch_memory,
)
from sightline.triton.counting import count_visible_keys
from sightline.triton.decode import Parts, attend_split, measure_split, merge_splits
from sightline.triton.descriptors import keys_can_be_described, rows_can_be_described
from sightline.triton.forward import attention_forward
from sightline.triton.gradients import PLAIN_COLUMNS, REWEIGHT_COLUMNS, prepare_rows
from sightline.triton.key_norms import measure_keys
from sightline.triton.mask_gradient import mask_gradient
from sightline.triton.problem import Heads, Problem, SavedRows, Variant
from sightline.triton.skipping import make_scratch, plan_waves
from sightline.triton.tiles import Tile, can_be_specialized, choose_tile
from sightline.triton.tuning import Describable, launch_tuned

# Decoding: the most rows of a key head that are packed, programs per multiprocessor that keep it busy, key tiles that
# are worth a program, and parts that are worth a merge.
_MOST_PACKED_ROWS = 64
_PROGRAMS_PER_PROCESSOR = 2
_LEAST_SPLIT_TILES = 4
_MOST_SPLITS = 128
# Key tiles of a row from which listing those that count is worth it.
LEAST_SKIPPING_TILES = 16


def _tiled(variant: Variant, tile: Tile, **changes: Any) -> Variant:
    return replace(variant, row_tile=tile.rows, key_tile=tile.keys, **changes)


def _tiles_of(length: int, tile: int) -> int:
    return -(-length // tile)


def _described(problem: Problem, variant: Variant, tile: Tile, describable: Describable) -> Variant:
    """The variant that loads what it streams as the tile says, or by pointers where that suits no descriptor."""
    described = tile.descriptors and describable()
    specialized = described and tile.specialized and problem.alibi_slopes is None and can_be_specialized(variant)
    return replace(variant, descriptors=described, specialized=specialized)


def _start(kernel: Any, programs: int, variant: Variant, tile: Tile, *arguments: Any) -> None:
    """Launch a kernel once; the variant is the last of its arguments."""
    options = launch_options(tile.warps, tile.stages, variant.specialized)
    start = functools.partial(kernel[(programs,)], *arguments, variant, **options)
    if variant.descriptors:
        with_scratch_memory(start)
    else:
        start()


def _repair(kernel: Any, programs: int, variant: Variant, tile: Tile, *arguments: Any) -> None:
    """Launch a kernel again for the programs whose result was not finite."""
    safe = _tiled(variant, tile, safe=True, descriptors=False, specialized=False)
    kernel[(programs,)](*arguments, safe, **launch_options(tile.warps))


def _launch(kernel: Any, programs: int, variant: Variant, tile: Tile, device: torch.device, *arguments: Any) -> None:
    """Launch a kernel, and again for the programs whose result was not finite."""
    repairs = torch.empty(programs, dtype=torch.int32, device=device)
    _start(kernel, programs, _tiled(variant, tile), tile, *arguments, repairs)
    _repair(kernel, programs, variant, tile, *arguments, repairs)


def with_visible_counts(problem: Problem, variant: Variant, query: Tensor, wanted: bool) -> Problem:
    """The problem with n_i of its attn_mask, where there is one and the number of keys of a row is wanted."""
    if problem.mask.data is None or not wanted:
        return problem
    batch, heads, queries, _ = query.shape
    counts = query.new_empty((batch, heads, queries), dtype=torch.int32)
    tile = choose_tile("forward", variant)
    launched = _tiled(variant, tile)
    grid = (batch * heads * _tiles_of(queries, tile.rows),)
    count_visible_keys[grid](problem, counts, batch * heads, launched, **launch_options(tile.warps))
    return problem._replace(visible_counts=counts)


def with_key_norms(problem: Problem, variant: Variant, key: Tensor) -> Problem:
    """The problem with 1 / |k_j| of every key, where the variant wants it."""
    if not variant.normalize_qk:
        return problem
    batch, heads, keys, _ = key.shape
    norms = key.new_empty((batch, heads, keys), dtype=torch.float32)
    tile = choose_tile("rows", variant)
    grid = (batch * heads * _tiles_of(keys, tile.rows),)
    if grid[0] > 0:
        measure_keys[grid](problem, norms, batch * heads, _tiled(variant, tile), **launch_options(tile.warps))
    return problem._replace(inverse_key_norms=norms)


def _key_splits(query: Tensor, key: Tensor, variant: Variant) -> int:
    """In how many parts to cut the keys; 1 where the rows alone keep the device busy, or are too many to pack."""
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    rows = heads // key_heads * queries
    tile = choose_tile("decode", variant)
    if rows > _MOST_PACKED_ROWS:
        return 1
    programs = batch * key_heads * _tiles_of(rows, tile.rows)
    wanted = _tiles_of(_PROGRAMS_PER_PROCESSOR * multiprocessors(query.device), programs)
    return max(1, min(wanted, _tiles_of(keys, _LEAST_SPLIT_TILES * tile.keys), _MOST_SPLITS))


def _decode(
    problem: Problem,
    variant: Variant,
    splits: int,
    query: Tensor,
    key: Tensor,
    output: Heads,
    log_normalizer: Tensor,
    saved: SavedRows,
) -> None:
    batch, heads, queries, _ = query.shape
    units = batch * key.shape[1]
    tile = choose_tile("decode", variant)
    split_keys = _tiles_of(_tiles_of(key.shape[2], tile.keys), splits) * tile.keys
    rows = batch * heads * queries
    spreads, sums = query.new_empty((2, splits, 3, rows), dtype=torch.float32)
    values = query.new_empty((splits, rows, variant.value_width), dtype=torch.float32)
    parts = Parts(spreads, sums, values, rows, splits, split_keys)
    packed = _tiled(variant, tile, packed_heads=True)
    tiles = units * _tiles_of(heads // key.shape[1] * queries, tile.rows)
    if variant.reweight:
        measure_split[(tiles * splits,)](problem, parts, units, packed, **launch_options(tile.warps, tile.stages))
    _launch(attend_split, tiles * splits, packed, tile, query.device, problem, parts, units)
    merge_splits[(tiles,)](problem, parts, output, log_normalizer, saved, units, packed, **launch_options(tile.warps))


def _forward(
    problem: Problem,
    variant: Variant,
    query: Tensor,
    key: Tensor,
    output: Heads,
    log_normalizer: Tensor,
    saved: SavedRows,
) -> None:
    batch, heads, queries, _ = query.shape
    units = batch * heads
    # A forward in fp32 has the keys in registers, where their norms cost little, and none to spare for loading them.
    if variant.dtype != "fp32":
        problem = with_key_norms(problem, variant, key)
    describable = functools.partial(keys_can_be_described, problem)

    def launch(tile: Tile) -> None:
        tiles = _tiles_of(queries, tile.rows)
        key_tiles = _tiles_of(key.shape[2], tile.keys)
        arguments = (problem, output, log_normalizer, saved, units, tiles)
        described = _described(problem, variant, tile, describable)
        if variant.reweight and not variant.masked_everywhere and key_tiles >= LEAST_SKIPPING_TILES:
            _launch_skipping(described, tile, query.device, key_tiles, *arguments)
        else:
            _launch(attention_forward, units * tiles, described, tile, query.device, *arguments, None, 0)

    launch_tuned("forward", variant, launch, describable)


def _launch_skipping(variant: Variant, tile: Tile, device: torch.device, key_tiles: int, *arguments: Any) -> None:
    """The forward kernel with tile skipping, in waves of programs; then those whose result was not finite."""
    units, tiles = arguments[-2:]
    programs = units * tiles
    waves = plan_waves(programs, key_tiles, tile.rows, multiprocessors(device))
    scratch = make_scratch(waves, programs, tile.rows, device)
    repairs = torch.empty(programs, dtype=torch.int32, device=device)
    skipping = _tiled(variant, tile, skips=True)
    for first in range(0, programs, waves.programs):
        launched = min(waves.programs, programs - first)
        _start(attention_forward, launched, skipping, tile, *arguments, scratch, first, repairs)
    _repair(attention_forward, programs, variant, tile, *arguments, None, 0, repairs)


def attention(*arguments: Any) -> tuple[Tensor, ...]:
    """`sightline::attention_triton`."""
    (query, key, value), options, (saves, row_statistics, *_) = split_arguments(arguments)
    if row_statistics != 0:
        raise RuntimeError("row_statistics: the Triton kernels compute none yet")
    batch, heads, queries, _ = query.shape
    width = value.shape[3]

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    problem = make_problem(query, key, value, options)
    variant = make_variant(query, value, options)
    output = fresh(batch, queries, heads, width, dtype=query.dtype).transpose(1, 2)
    log_normalizer = fresh(batch, heads, queries)
    reweights = options.reweights
    saved_rows = fresh(batch, heads, queries, 6 if reweights else 2) if saves else fresh(0)
    saved_values = fresh(batch, heads, queries, width) if saves and reweights else fresh(0)
    if output.numel() > 0:
        with launching_on(query.device):
            problem = with_visible_counts(problem, variant, query, variant.needs_count)
            written = interpretable(output)
            results = (heads_view(written), log_normalizer, SavedRows(saved_rows, saved_values))
            splits = 0 if saves else _key_splits(query, key, variant)
            if splits > 1:
                _decode(problem, variant, splits, query, key, *results)
            else:
                _forward(problem, replace(variant, saves=saves), query, key, *results)
            if written is not output:
                output.copy_(written)
    return (
        output,
        log_normalizer,
        saved_rows,
        saved_values,
        fresh(0),
        fresh(0, dtype=torch.int64),
        fresh(0),
        fresh(0, dtype=torch.int64),
        fresh(0),
    )


class Backward:
    """One call of the backward: its tensors as kernels read them."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        tensors, self.options, (_, needs_sinks, _) = split_backward_arguments(arguments)
        grad_output, grad_log_normalizer, query, key, value, output, saved_rows, saved_values = tensors
        self.query, self.key, self.value = query, key, value
        batch, self.heads, self.queries, _ = query.shape
        self.units = batch * self.heads
        self.variant = make_variant(query, value, self.options)
        counts = self.variant.needs_count or needs_sinks
        problem = with_visible_counts(make_problem(query, key, value, self.options), self.variant, query, counts)
        self.problem = with_key_norms(problem, self.variant, key)
        self.grad_output = heads_view(with_contiguous_rows(grad_output))
        self.output = heads_view(with_contiguous_rows(output))
        self.grad_log_normalizer = None if grad_log_normalizer is None else grad_log_normalizer.contiguous()
        self.saved = SavedRows(saved_rows, saved_values)
        self.rows = self.units * self.queries
        columns = REWEIGHT_COLUMNS if self.options.reweights else PLAIN_COLUMNS
        self.table = self.per_row(columns)

    def per_row(self, columns: int = 1) -> Tensor:
        return self.query.new_empty((columns, self.rows), dtype=torch.float32)

    def keys_describable(self) -> bool:
        return keys_can_be_described(self.problem)

    def rows_describable(self) -> bool:
        return rows_can_be_described(self.problem, self.grad_output)

    def prepare(self, sink_terms: Tensor | None) -> None:
        tile = choose_tile("rows", self.variant)
        prepare_rows[(_tiles_of(self.queries, tile.rows) * self.units,)](
            self.problem,
            self.output,
            self.grad_output,
            self.grad_log_normalizer,
            self.saved,
            self.table,
            self.rows,
            sink_terms,
            self.units,
            _tiled(self.variant, tile),
            **launch_options(tile.warps),
        )

    def differentiate_queries(self, target: Tensor, scale_terms: Tensor | None) -> None:
        def launch(tile: Tile) -> None:
            tiles = _tiles_of(self.queries, tile.rows)
            _launch(
                query_gradients,
                tiles * self.units,
                _described(self.problem, self.variant, tile, self.keys_describable),
                tile,
                self.query.device,
                self.problem,
                self.grad_output,
                self.table,
                self.rows,
                heads_view(target),
                scale_terms,
                self.units,
                tiles,
            )

        launch_tuned("queries", self.variant, launch, self.keys_describable)

    def differentiate_keys(self, grad_key: Tensor, grad_value: Tensor) -> None:
        key_units = self.key.shape[0] * self.key.shape[1]

        def launch(tile: Tile) -> None:
            _launch(
                key_gradients,
                _tiles_of(self.key.shape[2], tile.keys) * key_units,
                _described(self.problem, self.variant, tile, self.rows_describable),
                tile,
                self.query.device,
                self.problem,
                self.grad_output,
                self.table,
                self.rows,
                heads_view(grad_key),
                heads_view(grad_value),
                key_units,
            )

        launch_tuned("keys", self.variant, launch, self.rows_describable)

    def differentiate_mask(self, target: Tensor) -> None:
        tile = choose_tile("mask", self.variant)
        whole = (
            self.query.shape[0],
            self.heads,
            _tiles_of(self.queries, tile.rows),
            _tiles_of(self.key.shape[2], tile.keys),
        )
        shared = [size == 1 for size in target.shape]
        own = [1 if is_shared else count for is_shared, count in zip(shared, whole, strict=True)]
        summed = [count if is_shared else 1 for is_shared, count in zip(shared, whole, strict=True)]
        mask_gradient[(math.prod(own),)](
            self.problem,
            self.grad_output,
            self.table,
            self.rows,
            mask_view(target),
            *own,
            *summed,
            shared[2],
            shared[3],
            _tiled(self.variant, tile),
            **launch_options(tile.warps, tile.stages),
        )


def _sum_per_head(terms: Tensor, batch: int, heads: int) -> Tensor:
    """Sums per query row to sums per head, (H,)."""
    return terms.view(batch, heads, -1).sum((0, 2), dtype=torch.float64).float()


def attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`sightline::attention_triton_backward`."""
    query, key, value = arguments[2:5]
    needs_mask, needs_sinks, needs_scale = arguments[-3:]
    batch, heads = query.shape[:2]
    with launching_on(query.device):
        call = Backward(arguments)
        grads = [_empty_heads_like(tensor) for tensor in (query, key, value)]
        mask = call.options.attn_mask if needs_mask else None
        grad_mask = query.new_empty(0 if mask is None else mask.shape, dtype=torch.float32)
        sink_terms = call.per_row() if needs_sinks else None
        scale_terms = call.per_row() if needs_scale else None
        if call.rows == 0 or key.shape[2] == 0:
            for tensor in (*grads, grad_mask, sink_terms, scale_terms):
                if tensor is not None:
                    tensor.zero_()
        else:
            call.prepare(sink_terms)
            written = [interpretable(tensor) for tensor in grads]
            call.differentiate_queries(written[0], scale_terms)
            call.differentiate_keys(written[1], written[2])
            for tensor, source in zip(grads, written, strict=True):
                if source is not tensor:
                    tensor.copy_(source)
            if needs_mask:
                call.differentiate_mask(grad_mask)

    def per_head(terms: Tensor | None) -> Tensor:
        return query.new_empty(0, dtype=torch.float32) if terms is None else _sum_per_head(terms, batch, heads)

    return (
        *grads,
        grad_mask,
        per_head(sink_terms),
        per_head(scale_terms),
    )


def _empty_heads_like(tensor: Tensor) -> Tensor:
    batch, heads, rows, width = tensor.shape
    return tensor.new_empty((batch, rows, heads, width)).transpose(1, 2)
