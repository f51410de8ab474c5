"""A chunk of keys of the additive recurrence (MATH.md section 4): loading it, and the weights of its keys.

A chunk whose keys climb by less than e^40 is plain matrix products: with a shift per channel, the largest key or the
normaliser before the chunk, e_s = exp(x_s - shift), inverse_t = e^shift / Delta_t, and exp(x_s - z_t) = e_s inverse_t.
Where a channel climbs further, or a number is not finite, the program walks the rows of its tile one by one instead,
with the tile of the state in registers: the recurrence itself. So every exponent is at most 0 or the sum of two that
are at most 40, and what is not finite reaches no row that does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.problem import Heads

# e^-40: the least normaliser, in units of the chunk's largest key, that is not walked row by row.
LEAST_NORMALIZER = tl.constexpr(4.248354255291589e-18)


class RecurrenceProblem(NamedTuple):
    """The inputs of a launch. A sequence is a batch entry or a packed document; chunks are numbered through all."""

    query: Heads
    key: Heads
    value: Heads
    key_gain: Heads
    key_mask: Any  # (B, N) uint8
    mask_batch_stride: Any
    mask_row_stride: Any
    key_heads: Any
    group: Any  # query heads of a key head
    columns: Any  # Dv, for loops that ptxas would unroll if it knew how long they are, until registers spill
    scale: Any
    chunk_sequences: Any  # (chunks,) int64
    chunk_firsts: Any  # (chunks,) int64: the first row
    chunk_rows: Any  # (chunks,) int64: the number of rows, 0 where there is no such chunk
    sequence_chunks: Any  # (sequences + 1,) int64: the first chunk of each
    log_normalizers: Any  # (chunks, Hk, Dk): z before each chunk
    states: Any  # (chunks, Hk, Dk, Dv): S before each chunk, `rounded`
    final_log_normalizer: Any  # (sequences, Hk, Dk)
    final_state: Any  # (sequences, Hk, Dk, Dv)
    final_shift: Any  # (sequences, Hk, Dk): the final Delta once more, as e^shift times a number of at least 1, because
    final_inverse: Any  # (sequences, Hk, Dk): e^(x - z) of large logarithms is not exact; 1 / number, or 0


@dataclass(frozen=True)
class RecurrenceVariant:
    """What a kernel is compiled for."""

    width: int
    value_width: int
    rows: int  # of a chunk
    block_width: int  # channels of a tile
    block_value_width: int
    # Of products: "ieee" for float32, "tf32" (as many bits as float16 has) for 16-bit inputs where the chip has it.
    precision: str
    # float16 has as many bits as tf32: where <G, S> takes most of a gradient away, its products need those of fp32.
    keeps_remainders: bool
    causal: bool
    packed: bool
    has_gain: bool
    has_mask: bool


class Chunk(NamedTuple):
    """Rows first to first + rows of a batch entry."""

    index: Any
    sequence: Any
    batch: Any
    first: Any
    rows: Any


class Weights(NamedTuple):
    """The keys of a tile: `fast` is whether they make matrix products."""

    weights: Any  # (rows, channels) e
    inverse: Any  # (rows, channels), 0 before the first key
    before: Any  # (channels,) exp(z_in - shift)
    fast: Any


@triton.jit
def find_chunk(problem, variant: tl.constexpr, index):
    sequence = tl.load(problem.chunk_sequences + index)
    batch = sequence
    if variant.packed:
        batch = sequence * 0
    return Chunk(
        tl.cast(index, tl.int64),
        sequence,
        batch,
        tl.load(problem.chunk_firsts + index),
        tl.load(problem.chunk_rows + index),
    )


@triton.jit
def rounded(x, variant: tl.constexpr):
    """What is computed here as an operand of products: a product of tf32 reads the first ten bits of a mantissa.

    The tensor cores would drop the others, so that all products were too small and float16 outputs off by 1e-3. What is
    16 bits wide in memory has no others.
    """
    if variant.precision == "tf32":
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where(x == x, ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def dot(left, right, variant: tl.constexpr):
    return tl.dot(left, right, input_precision=variant.precision)


@triton.jit
def remainder(x, variant: tl.constexpr):
    """What rounded() takes away, rounded: with a product of its own, x has 22 bits.

    It may be negative or 0 where x is not: it must not meet what is not finite.
    """
    first = rounded(x, variant)
    return rounded(tl.where(tl.abs(first) < float("inf"), x - first, 0.0), variant)


@triton.jit
def all_finite(tile):
    return tl.min((tl.abs(tile) < float("inf")).to(tl.int32)) == 1


@triton.jit
def takes_part(problem, variant: tl.constexpr, chunk, rows):
    """Which of these rows of the chunk, a block or one, have a key that takes part."""
    live = (rows >= 0) & (rows < chunk.rows)
    if variant.has_mask:
        place = chunk.batch * problem.mask_batch_stride + (chunk.first + rows) * problem.mask_row_stride
        live = live & (tl.load(problem.key_mask + place, mask=live, other=0) != 0)
    return live


@triton.jit
def heads_pointer(heads, chunk, head):
    return heads.data + chunk.batch * heads.batch_stride + head.to(tl.int64) * heads.head_stride


@triton.jit
def rows_of(chunk, count: tl.constexpr, backwards: tl.constexpr):
    """The chunk's row in every row of a tile; `backwards`, the chunk's last row comes first."""
    if backwards:
        return chunk.rows - 1 - tl.arange(0, count)
    else:
        return tl.arange(0, count)


@triton.jit
def load_tile(
    heads, chunk, head, live, column, width: tl.constexpr, block: tl.constexpr, backwards: tl.constexpr = False
):
    """(rows, block) in fp32 from `column` on; 0 in rows that are not live."""
    rows = chunk.first + rows_of(chunk, live.shape[0], backwards)
    columns = column + tl.arange(0, block)
    places = heads_pointer(heads, chunk, head) + rows[:, None] * heads.row_stride + columns[None, :]
    return tl.load(places, mask=live[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(heads, chunk, head, column, tile, width: tl.constexpr, block: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])
    columns = column + tl.arange(0, block)
    places = heads_pointer(heads, chunk, head) + (chunk.first + rows)[:, None] * heads.row_stride + columns[None, :]
    tl.store(places, tile, mask=(rows < chunk.rows)[:, None] & (columns < width)[None, :])


@triton.jit
def load_row(heads, chunk, head, row, live, column, width: tl.constexpr, block: tl.constexpr):
    """(block,) in fp32 from `column` on; 0 where the row is not live."""
    columns = column + tl.arange(0, block)
    place = heads_pointer(heads, chunk, head) + (chunk.first + row) * heads.row_stride
    return tl.load(place + columns, mask=live & (columns < width), other=0.0).to(tl.float32)


@triton.jit
def load_keys(problem, variant: tl.constexpr, chunk, key_head, live, channel, backwards: tl.constexpr = False):
    """(rows, channels) logits, -inf where no key takes part."""
    keys = load_tile(problem.key, chunk, key_head, live, channel, variant.width, variant.block_width, backwards)
    inside = channel + tl.arange(0, variant.block_width) < variant.width
    return tl.where(live[:, None] & inside[None, :], keys, -float("inf"))


@triton.jit
def load_key_row(problem, variant: tl.constexpr, chunk, key_head, row, live, channel):
    key = load_row(problem.key, chunk, key_head, row, live, channel, variant.width, variant.block_width)
    inside = channel + tl.arange(0, variant.block_width) < variant.width
    return tl.where(live & inside, key, -float("inf"))


@triton.jit
def load_channels(source, unit, channel, variant: tl.constexpr, other):
    """(channels,) of (units, Dk) numbers."""
    channels = channel + tl.arange(0, variant.block_width)
    return tl.load(source + unit * variant.width + channels, mask=channels < variant.width, other=other)


@triton.jit
def state_places(states, unit, channel, column, variant: tl.constexpr):
    """Pointers to a tile (channels, columns) of (units, Dk, Dv), and which of them exist."""
    channels = channel + tl.arange(0, variant.block_width)
    columns = column + tl.arange(0, variant.block_value_width)
    places = (unit * variant.width + channels)[:, None] * variant.value_width + columns[None, :]
    return states + places, (channels < variant.width)[:, None] & (columns < variant.value_width)[None, :]


@triton.jit
def load_state(states, unit, channel, column, variant: tl.constexpr):
    places, inside = state_places(states, unit, channel, column, variant)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def weigh_keys(keys, z, backwards: tl.constexpr = False):
    """The weights of the keys after a normaliser z (channels,)."""
    largest = tl.maximum(tl.max(keys, axis=0), z)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    weights = tl.exp(keys - shift[None, :])
    before = tl.exp(z - shift)
    total = before[None, :] + tl.cumsum(weights, axis=0, reverse=backwards)
    met = tl.cumsum((keys != -float("inf")).to(tl.int32), axis=0, reverse=backwards) > 0
    met = met | (z != -float("inf"))[None, :]
    safe = (total >= LEAST_NORMALIZER) | (met == 0)
    inverse = tl.where(met, 1.0 / tl.where(met, total, 1.0), 0.0)
    return Weights(weights, inverse, before, tl.min(safe.to(tl.int32)) == 1)


@triton.jit
def weigh_finally(problem, variant: tl.constexpr, own, channel, keys):
    """exp(x - z) with the normaliser of the whole sequence, 0 where it has no key."""
    shift = load_channels(problem.final_shift, own, channel, variant, 0.0)
    inverse = load_channels(problem.final_inverse, own, channel, variant, 0.0)
    dead = inverse == 0.0
    return tl.where(dead[None, :], 0.0, tl.exp(keys - tl.where(dead, 0.0, shift)[None, :]) * inverse[None, :])


@triton.jit
def row_of(tile, row):
    """(channels,): one row of a tile."""
    return tl.sum(tl.where((tl.arange(0, tile.shape[0]) == row)[:, None], tile, 0.0), axis=0)


@triton.jit
def add_logs(z, key):
    """(ln(e^z + e^key), e^z and e^key over the sum): z' and the two shares, all for -inf where both are."""
    dead = (z == -float("inf")) & (key == -float("inf"))  # the larger of -inf and NaN is -inf too
    shift = tl.where(dead, 0.0, tl.maximum(z, key))
    past = tl.exp(z - shift)
    present = tl.exp(key - shift)
    total = tl.where(dead, 1.0, past + present)
    return tl.where(dead, -float("inf"), shift + tl.log(total)), past / total, present / total


@triton.jit
def walk_log_normalizers(problem, variant: tl.constexpr, chunk, key_head, channel, z, backwards: tl.constexpr = False):
    """z_t of every row of the chunk, (rows, channels), one row after the other."""
    index = rows_of(chunk, variant.rows, backwards)
    tile = tl.full((variant.rows, variant.block_width), -float("inf"), tl.float32)
    for row in tl.range(0, chunk.rows):
        live = takes_part(problem, variant, chunk, row)
        z, _, _ = add_logs(z, load_key_row(problem, variant, chunk, key_head, row, live, channel))
        tile = tl.where((index == row)[:, None], z[None, :], tile)
    return tile


@triton.jit
def advance_state(problem, variant: tl.constexpr, chunk, key_head, row, channel, column, z, state):
    """(z, state) after one more row: the recurrence as it stands in MATH.md."""
    live = takes_part(problem, variant, chunk, row)
    z, decay, weight = add_logs(z, load_key_row(problem, variant, chunk, key_head, row, live, channel))
    value = load_row(problem.value, chunk, key_head, row, live, column, variant.value_width, variant.block_value_width)
    if variant.has_gain:
        weight = weight * load_row(
            problem.key_gain, chunk, key_head, row, live, channel, variant.width, variant.block_width
        )
    added = tl.where((weight != 0.0)[:, None], weight[:, None] * value[None, :], 0.0)
    return z, decay[:, None] * state + added
