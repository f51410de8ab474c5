"""The additive recurrence, backward (MATH.md section 4), parallel over chunks.

From the states before every chunk, which the forward kernels compute again: `query_gradients` gives dq and the sums of
q dq, `sum_back` every chunk's own part of G, `scan_back` goes over the chunks from the last to the first and leaves in
their place G and r after each; recurrence_key_gradients.py computes the rest. G is called `state gradient` here and r
`response`. Without order both are the same for all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    rounded,
    rows_of,
    state_places,
    store_tile,
    takes_part,
    walk_log_normalizers,
    weigh_keys,
)
from sightline.triton.recurrence_forward import load_gain


class Gradients(NamedTuple):
    """What the backward kernels pass to each other, all fp32; with the gradient of the output."""

    grad_output: Any  # Heads
    query_responses: Any  # Heads (B, Hk, N, Dk): q dq summed over the query heads of the group
    responses: Any  # (chunks, Hk, Dk): the chunk's own part of r, then r after the chunk
    state_gradients: Any  # (chunks, Hk, Dk, Dv): the chunk's own part of G, then G after the chunk, `rounded`
    first_response: Any  # (sequences, Hk, Dk): r before the first chunk; without order r of all rows
    first_state_gradient: Any  # (sequences, Hk, Dk, Dv): likewise G


@triton.jit
def load_grad_output(
    problem, gradients, variant: tl.constexpr, chunk, head, within, column, backwards: tl.constexpr = False
):
    return load_tile(
        gradients.grad_output,
        chunk,
        head,
        within,
        column,
        variant.value_width,
        variant.block_value_width,
        backwards,
    )


@triton.jit
def decays_from_start(
    problem, variant: tl.constexpr, chunk, key_head, channel, keys, z, backwards: tl.constexpr = False
):
    """exp(z_in - z_t) of every row, 0 before the first key."""
    found = weigh_keys(keys, z, backwards)
    decays = found.before[None, :] * found.inverse
    if found.fast == 0:
        own = walk_log_normalizers(problem, variant, chunk, key_head, channel, z, backwards)
        decays = tl.where(own == -float("inf"), 0.0, tl.exp(z[None, :] - own))
    return decays


@triton.jit
def walk_query_gradients(problem, gradients, variant: tl.constexpr, chunk, key_head, head, channel, column, z, state):
    """S_t do_t over a tile of value columns, row by row: (rows, channels)."""
    index = tl.arange(0, variant.rows)
    tile = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
    for row in tl.range(0, chunk.rows):
        z, state = advance_state(problem, variant, chunk, key_head, row, channel, column, z, state)
        received = load_row(
            gradients.grad_output, chunk, head, row, row >= 0, column, variant.value_width, variant.block_value_width
        )
        part = tl.where(z == -float("inf"), 0.0, tl.sum(received[None, :] * state, axis=1))
        tile = tl.where((index == row)[:, None], part[None, :], tile)
    return tile


@triton.jit
def query_gradients(problem, gradients, grad_query, variant: tl.constexpr):
    """dq of the group's heads in one chunk, a tile of channels, and what r receives of it."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    channel = tl.program_id(2) * variant.block_width
    index = tl.arange(0, variant.rows)
    within = index < chunk.rows
    live = takes_part(problem, variant, chunk, index)
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    if variant.causal:
        z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
    else:
        z = load_channels(problem.final_log_normalizer, own, channel, variant, -float("inf"))
    keys = load_keys(problem, variant, chunk, key_head, live, channel)
    found = weigh_keys(keys, z)
    gain = load_gain(problem, variant, chunk, key_head, live, channel)
    fast = found.fast & all_finite(gain)
    response = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
    for member in tl.range(0, problem.group):
        head = key_head * problem.group + member
        gradient = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
        scores = tl.full((variant.rows, variant.rows), 0.0, tl.float32)
        for column in tl.range(0, variant.value_width, variant.block_value_width):
            received = load_grad_output(problem, gradients, variant, chunk, head, within, column)
            if variant.causal:
                state = load_state(problem.states, unit, channel, column, variant)
                if fast:
                    values = load_tile(
                        problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
                    )
                    gradient += dot(received, tl.trans(state), variant)
                    scores += dot(received, tl.trans(values), variant)
                else:
                    gradient += walk_query_gradients(
                        problem, gradients, variant, chunk, key_head, head, channel, column, z, state
                    )
            else:
                state = load_state(problem.final_state, own, channel, column, variant)
                gradient += dot(received, tl.trans(rounded(state, variant)), variant)
        if variant.causal:
            if fast:
                scores = tl.where(index[:, None] >= index[None, :], scores, 0.0)
                gradient = gradient * found.before[None, :] + dot(
                    rounded(scores, variant), rounded(found.weights * gain, variant), variant
                )
                gradient = tl.where(found.inverse == 0.0, 0.0, gradient * found.inverse)
        else:
            gradient = tl.where((z == -float("inf"))[None, :], 0.0, gradient)
        gradient = gradient * problem.scale
        store_tile(grad_query, chunk, head, channel, gradient, variant.width, variant.block_width)
        queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
        response += tl.where(gradient == 0.0, 0.0, queries * gradient)
    if variant.causal:
        store_tile(gradients.query_responses, chunk, key_head, channel, response, variant.width, variant.block_width)
        decays = decays_from_start(problem, variant, chunk, key_head, channel, keys, z)
        # In fp64: the first rows weigh most, and what is small is lost where it is added to their sum one by one.
        part = -tl.sum(tl.where(decays == 0.0, 0.0, decays * response).to(tl.float64), axis=0).to(tl.float32)
        channels = channel + tl.arange(0, variant.block_width)
        tl.store(gradients.responses + unit * variant.width + channels, part, mask=channels < variant.width)


@triton.jit
def sum_back(problem, gradients, variant: tl.constexpr):
    """A chunk's own part of G before it: sum over its rows of exp(z_in - z_t) scale q_t do_t^T.

    From the last row to the first, as the recurrence has it: later rows weigh less, and small terms that are added
    first are not lost beside large ones.
    """
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    tiles: tl.constexpr = (variant.value_width + variant.block_value_width - 1) // variant.block_value_width
    channel = tl.program_id(2) // tiles * variant.block_width
    column = tl.program_id(2) % tiles * variant.block_value_width
    index = rows_of(chunk, variant.rows, True)
    within = index >= 0
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    if variant.causal:
        live = takes_part(problem, variant, chunk, index)
        z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
        keys = load_keys(problem, variant, chunk, key_head, live, channel, True)
        decays = decays_from_start(problem, variant, chunk, key_head, channel, keys, z, True)
    else:
        z = load_channels(problem.final_log_normalizer, own, channel, variant, -float("inf"))
        decays = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
        decays += tl.where(z == -float("inf"), 0.0, 1.0)[None, :]
    total = tl.full((variant.block_width, variant.block_value_width), 0.0, tl.float32)
    for member in tl.range(0, problem.group):
        head = key_head * problem.group + member
        queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width, True)
        queries = tl.where(decays == 0.0, 0.0, queries * decays) * problem.scale
        received = load_grad_output(problem, gradients, variant, chunk, head, within, column, True)
        total += dot(tl.trans(rounded(queries, variant)), received, variant)
    places, inside = state_places(gradients.state_gradients, unit, channel, column, variant)
    tl.store(places, total, mask=inside)


@triton.jit
def scan_back(problem, gradients, grad_state, final_response, variant: tl.constexpr):
    """G and r after every chunk of a sequence, and before the first. `grad_state` and `final_response` begin it."""
    sequence = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    tiles: tl.constexpr = (variant.value_width + variant.block_value_width - 1) // variant.block_value_width
    channel = tl.program_id(2) // tiles * variant.block_width
    column = tl.program_id(2) % tiles * variant.block_value_width
    channels = channel + tl.arange(0, variant.block_width)
    own = sequence * problem.key_heads + key_head
    gradient = load_state(grad_state, own, channel, column, variant)
    response = load_channels(final_response, own, channel, variant, 0.0)
    later = load_channels(problem.final_log_normalizer, own, channel, variant, -float("inf"))
    begin = tl.load(problem.sequence_chunks + sequence)
    end = tl.load(problem.sequence_chunks + sequence + 1)
    for step in tl.range(begin, end):
        unit = (begin + end - 1 - step) * problem.key_heads + key_head
        places, inside = state_places(gradients.state_gradients, unit, channel, column, variant)
        found = tl.load(places, mask=inside, other=0.0)
        if variant.causal:
            tl.store(places, rounded(gradient, variant), mask=inside)
            z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
            decay = tl.where(z == -float("inf"), 0.0, tl.exp(z - later))
            later = z
            gradient = tl.where((decay == 0.0)[:, None], 0.0, decay[:, None] * gradient) + found
            if column == 0:
                target = gradients.responses + unit * variant.width + channels
                part = tl.load(target, mask=channels < variant.width, other=0.0)
                tl.store(target, response, mask=channels < variant.width)
                response = tl.where(decay == 0.0, 0.0, decay * response) + part
        else:
            gradient += found
    places, inside = state_places(gradients.first_state_gradient, own, channel, column, variant)
    tl.store(places, gradient, mask=inside)
    if column == 0:
        target = gradients.first_response + own * variant.width + channels
        tl.store(target, response, mask=channels < variant.width)
