"""Tiles of what a kernel streams by tensor descriptors: one instruction of the tensor memory accelerator (TMA) each.

A program describes the keys and the values of its head once, in memory that Triton asks the launcher for, and its
loops load by descriptor what they would load by pointers: whole rows of a tile, zero past the last key. So masks,
NaN and what is skipped stay as they are. The gradient of the keys streams rows instead: queries and the gradients of
the output, described anew for every head of the group. `Variant.descriptors` says which of the two a kernel is compiled
for; tiles.py asks for it, and `can_be_described` says whether the tensors allow it: the accelerator wants rows and
heads on 16-byte boundaries. Launches that repair non-finite results, decoding and the gradient of a mask load by
pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sightline.triton.problem import Heads, Problem
from sightline.triton.rows import load_rows
from sightline.triton.scores import load_keys

_ALIGNMENT = 16  # bytes
_LEAST_WIDTH = 16  # of a tile that meets another in a product: a descriptor pads no columns


class KeyDescriptors(NamedTuple):
    """The keys and the values of one head."""

    key: Any
    value: Any


class RowDescriptors(NamedTuple):
    """The queries of one head and the gradients of its output."""

    query: Any
    upstream: Any


def can_be_described(tensor: Tensor) -> bool:
    """Whether a (batch, head, row, column) tensor suits the accelerator, for every head of it."""
    rows, width = tensor.shape[2:]
    size = tensor.element_size()
    strides = [stride for stride, count in zip(tensor.stride()[:2], tensor.shape[:2], strict=True) if count > 1]
    return (
        rows > 0
        and width & (width - 1) == 0
        and width >= _LEAST_WIDTH
        and tensor.stride(3) == 1
        and tensor.stride(2) >= width
        and all(stride * size % _ALIGNMENT == 0 for stride in (*strides, tensor.stride(2)))
        and tensor.data_ptr() % _ALIGNMENT == 0
    )


def keys_can_be_described(problem: Problem) -> bool:
    """Whether keys and values both do."""
    return can_be_described(problem.key.data) and can_be_described(problem.value.data)


def rows_can_be_described(problem: Problem, grad_output: Heads) -> bool:
    """Whether queries and the gradients of the output both do."""
    return can_be_described(problem.query.data) and can_be_described(grad_output.data)


@triton.jit
def describe(heads, batch, head, rows, tile: tl.constexpr, width: tl.constexpr):
    """The descriptor of one head of a tensor, for tiles of `tile` rows."""
    base = heads.data + batch.to(tl.int64) * heads.batch_stride + head.to(tl.int64) * heads.head_stride
    return tl.make_tensor_descriptor(base, [rows, width], [heads.row_stride, 1], [tile, width])


@triton.jit
def describe_keys(problem, variant: tl.constexpr, rows):
    """The descriptors of the keys and values that rows see, where the variant loads by descriptors."""
    tile: tl.constexpr = variant.key_tile
    return KeyDescriptors(
        describe(problem.key, rows.batch, rows.key_head, problem.keys, tile, variant.head_width),
        describe(problem.value, rows.batch, rows.key_head, problem.keys, tile, variant.value_width),
    )


@triton.jit
def load_key_tile(problem, variant: tl.constexpr, MASKED: tl.constexpr, descriptors, rows, first_key):
    """The keys of a tile as they are stored, (keys, block width); zero past the end where MASKED."""
    if variant.descriptors:
        return descriptors.key.load([first_key, 0])
    else:
        keys = first_key + tl.arange(0, variant.key_tile)
        return load_keys(problem.key, rows, keys, problem.keys, MASKED, variant.head_width, variant.block_width)


@triton.jit
def load_value_tile(problem, variant: tl.constexpr, MASKED: tl.constexpr, descriptors, rows, first_key):
    """The values of a tile, as load_key_tile."""
    if variant.descriptors:
        return descriptors.value.load([first_key, 0])
    else:
        keys = first_key + tl.arange(0, variant.key_tile)
        return load_keys(
            problem.value, rows, keys, problem.keys, MASKED, variant.value_width, variant.block_value_width
        )


@triton.jit
def describe_rows(problem, variant: tl.constexpr, grad_output, batch, head):
    """The descriptors of what a query head streams, where the variant loads by descriptors."""
    tile: tl.constexpr = variant.row_tile
    return RowDescriptors(
        describe(problem.query, batch, head, problem.queries, tile, variant.head_width),
        describe(grad_output, batch, head, problem.queries, tile, variant.value_width),
    )


@triton.jit
def load_row_tiles(problem, variant: tl.constexpr, grad_output, descriptors, rows, first_row):
    """(queries, gradients of the output) of a tile of rows as they are stored; zero past the last row."""
    if variant.descriptors:
        queries = descriptors.query.load([first_row, 0])
        upstream = descriptors.upstream.load([first_row, 0])
    else:
        queries = load_rows(problem.query, rows, variant.head_width, variant.block_width)
        upstream = load_rows(grad_output, rows, variant.value_width, variant.block_value_width)
    return queries, upstream
