"""The additive recurrence, forward (MATH.md section 4), parallel over chunks.

`sum_chunks` gives every chunk's own normaliser and state, `scan_chunks` goes over the chunks of a sequence and leaves
in their place the state before each, and `recurrence_outputs` computes the chunks' outputs from it. Each of them
computes the gate from the keys; nothing of it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.recurrence_chunk import (
    advance_state,
    all_finite,
    dot,
    find_chunk,
    load_channels,
    load_keys,
    load_row,
    load_state,
    load_tile,
    remainder,
    rounded,
    state_places,
    store_tile,
    takes_part,
    weigh_keys,
)


@triton.jit
def load_gain(problem, variant: tl.constexpr, chunk, key_head, live, channel):
    """(rows, channels) of key_gain, 1 where there is none."""
    if variant.has_gain:
        return load_tile(problem.key_gain, chunk, key_head, live, channel, variant.width, variant.block_width)
    else:
        return tl.full((variant.rows, variant.block_width), 1.0, tl.float32)


@triton.jit
def sum_chunks(problem, chunk_normalizers, variant: tl.constexpr):
    """ln sum e^x of every chunk, and its state from nothing into `problem.states`."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    tiles: tl.constexpr = (variant.value_width + variant.block_value_width - 1) // variant.block_value_width
    channel = tl.program_id(2) // tiles * variant.block_width
    column = tl.program_id(2) % tiles * variant.block_value_width
    live = takes_part(problem, variant, chunk, tl.arange(0, variant.rows))
    keys = load_keys(problem, variant, chunk, key_head, live, channel)
    dead = tl.max((keys != -float("inf")).to(tl.int32), axis=0) == 0  # the largest of NaN alone is -inf too
    shift = tl.where(dead, 0.0, tl.max(keys, axis=0))
    weights = tl.exp(keys - shift[None, :])
    total = tl.where(dead, 1.0, tl.sum(weights, axis=0))
    weights = weights * load_gain(problem, variant, chunk, key_head, live, channel) / total[None, :]
    values = load_tile(problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width)
    unit = chunk.index * problem.key_heads + key_head
    places, inside = state_places(problem.states, unit, channel, column, variant)
    state = dot(tl.trans(rounded(weights, variant)), values, variant)
    if variant.keeps_remainders:  # noqa: SIM102 - the compiler leaves out what follows a constant alone
        if all_finite(values):
            state += dot(tl.trans(remainder(weights, variant)), values, variant)
    tl.store(places, state, mask=inside)
    if column == 0:
        channels = channel + tl.arange(0, variant.block_width)
        found = tl.where(dead, -float("inf"), shift + tl.log(total))
        tl.store(chunk_normalizers + unit * variant.width + channels, found, mask=channels < variant.width)


@triton.jit
def log_normalizer(shift, total):
    """shift + ln total, -inf where the total (in fp64) is 0.

    In fp64 up to the last rounding: what a call of few keys adds to 1 is less than fp32 resolves beside it.
    """
    dead = total == 0.0
    return tl.where(dead, -float("inf"), (shift + tl.log(tl.where(dead, 1.0, total))).to(tl.float32))


@triton.jit
def scan_chunks(problem, chunk_normalizers, initial_log_normalizer, initial_state, variant: tl.constexpr):
    """z and S before every chunk of a sequence, and after the last.

    The sum of a channel is kept in fp64 in units of its shift: a chunk adds a millionth part after a million keys.
    """
    sequence = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    tiles: tl.constexpr = (variant.value_width + variant.block_value_width - 1) // variant.block_value_width
    channel = tl.program_id(2) // tiles * variant.block_width
    column = tl.program_id(2) % tiles * variant.block_value_width
    channels = channel + tl.arange(0, variant.block_width)
    own = sequence * problem.key_heads + key_head
    state = tl.full((variant.block_width, variant.block_value_width), 0.0, tl.float32)
    shift = tl.full((variant.block_width,), -float("inf"), tl.float32)
    if initial_log_normalizer is not None:
        shift = load_channels(initial_log_normalizer, own, channel, variant, -float("inf"))
        state = load_state(initial_state, own, channel, column, variant)
    total = tl.where(shift == -float("inf"), 0.0, 1.0).to(tl.float64)
    begin = tl.load(problem.sequence_chunks + sequence)
    end = tl.load(problem.sequence_chunks + sequence + 1)
    for index in tl.range(begin, end):
        unit = index * problem.key_heads + key_head
        places, inside = state_places(problem.states, unit, channel, column, variant)
        found = tl.load(places, mask=inside, other=0.0)
        key = load_channels(chunk_normalizers, unit, channel, variant, -float("inf"))
        tl.store(places, rounded(state, variant), mask=inside)
        if column == 0:
            z = log_normalizer(shift, total)
            tl.store(problem.log_normalizers + unit * variant.width + channels, z, mask=channels < variant.width)
        largest = tl.maximum(shift, key)
        dead = largest == -float("inf")
        base = tl.where(dead, 0.0, largest)
        past = total * tl.exp(shift - base).to(tl.float64)
        present = tl.exp(key - base).to(tl.float64)
        total = past + present
        divisor = tl.where(total == 0.0, 1.0, total)
        state = (past / divisor).to(tl.float32)[:, None] * state + (present / divisor).to(tl.float32)[:, None] * found
        shift = largest
    places, inside = state_places(problem.final_state, own, channel, column, variant)
    tl.store(places, state, mask=inside)
    if column == 0:
        z = log_normalizer(shift, total)
        target = own * variant.width + channels
        exists = channels < variant.width
        tl.store(problem.final_log_normalizer + target, z, mask=exists)
        tl.store(problem.final_shift + target, shift, mask=exists)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total)).to(tl.float32)
        tl.store(problem.final_inverse + target, inverse, mask=exists)


@triton.jit
def walk_outputs(problem, variant: tl.constexpr, chunk, key_head, head, channel, column, z, state):
    """The part of a tile of channels in the outputs of a chunk, row by row."""
    index = tl.arange(0, variant.rows)
    outputs = tl.full((variant.rows, variant.block_value_width), 0.0, tl.float32)
    for row in tl.range(0, chunk.rows):
        z, state = advance_state(problem, variant, chunk, key_head, row, channel, column, z, state)
        query = load_row(problem.query, chunk, head, row, row >= 0, channel, variant.width, variant.block_width)
        query = tl.where(z == -float("inf"), 0.0, query)
        output = tl.sum(query[:, None] * state, axis=0)
        outputs = tl.where((index == row)[:, None], output[None, :], outputs)
    return outputs


@triton.jit
def recurrence_outputs(problem, output, variant: tl.constexpr):
    """The outputs of one query head in one chunk, a tile of value columns."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    head = tl.program_id(1)
    key_head = head // problem.group
    column = tl.program_id(2) * variant.block_value_width
    index = tl.arange(0, variant.rows)
    within = index < chunk.rows
    live = takes_part(problem, variant, chunk, index)
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    total = tl.full((variant.rows, variant.block_value_width), 0.0, tl.float32)
    scores = tl.full((variant.rows, variant.rows), 0.0, tl.float32)
    values = load_tile(problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width)
    finite_values = all_finite(values)
    for channel in tl.range(0, variant.width, variant.block_width):
        queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
        if variant.causal:
            z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
            state = load_state(problem.states, unit, channel, column, variant)
            found = weigh_keys(load_keys(problem, variant, chunk, key_head, live, channel), z)
            gain = load_gain(problem, variant, chunk, key_head, live, channel)
            if found.fast & finite_values & all_finite(gain):
                scaled = tl.where(found.inverse == 0.0, 0.0, queries * found.inverse)
                total += dot(rounded(scaled * found.before[None, :], variant), state, variant)
                scores += dot(rounded(scaled, variant), tl.trans(rounded(found.weights * gain, variant)), variant)
            else:
                total += walk_outputs(problem, variant, chunk, key_head, head, channel, column, z, state)
        else:
            z = load_channels(problem.final_log_normalizer, own, channel, variant, -float("inf"))
            state = load_state(problem.final_state, own, channel, column, variant)
            total += dot(tl.where((z == -float("inf"))[None, :], 0.0, queries), rounded(state, variant), variant)
    if variant.causal and finite_values:
        total += dot(rounded(tl.where(index[:, None] >= index[None, :], scores, 0.0), variant), values, variant)
    store_tile(output, chunk, head, column, total * problem.scale, variant.value_width, variant.block_value_width)
