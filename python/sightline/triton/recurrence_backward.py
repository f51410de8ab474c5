"""The additive recurrence, backward (MATH.md section 4), parallel over chunks.

From the states before every chunk, which the forward kernels compute again: `query_gradients` gives dq and the sums of
q dq, `sum_back` every chunk's own part of G, `scan_back` goes over the chunks from the last to the first and leaves in
their place G and r after each, and `key_gradients` and `value_gradients` compute the rest. The names of other kernels
are kept: G is `state gradient`, r `response`. Without order G and r are the same for all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sightline.triton.recurrence_chunk import (
    add_logs,
    advance_state,
    all_finite,
    dot,
    find_chunk,
    load_channels,
    load_key_row,
    load_keys,
    load_row,
    load_state,
    load_tile,
    row_of,
    state_places,
    store_tile,
    takes_part,
    walk_log_normalizers,
    weigh_finally,
    weigh_keys,
)
from sightline.triton.recurrence_forward import load_gain


class Gradients(NamedTuple):
    """What the backward kernels pass to each other, all fp32; with the gradient of the output."""

    grad_output: Any  # Heads
    query_responses: Any  # Heads (B, Hk, N, Dk): q dq summed over the query heads of the group
    responses: Any  # (chunks, Hk, Dk): the chunk's own part of r, then r after the chunk
    state_gradients: Any  # (chunks, Hk, Dk, Dv): the chunk's own part of G, then G after the chunk
    first_response: Any  # (sequences, Hk, Dk): r before the first chunk; without order r of all rows
    first_state_gradient: Any  # (sequences, Hk, Dk, Dv): likewise G


@triton.jit
def load_grad_output(problem, gradients, variant: tl.constexpr, chunk, head, within, column):
    return load_tile(gradients.grad_output, chunk, head, within, column, variant.value_width, variant.block_value_width)


@triton.jit
def decays_from_start(problem, variant: tl.constexpr, chunk, key_head, channel, keys, z):
    """exp(z_in - z_t) of every row, 0 before the first key."""
    found = weigh_keys(keys, z)
    decays = found.before[None, :] * found.inverse
    if found.fast == 0:
        own = walk_log_normalizers(problem, variant, chunk, key_head, channel, z)
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
                gradient += dot(received, tl.trans(state), variant)
        if variant.causal:
            if fast:
                scores = tl.where(index[:, None] >= index[None, :], scores, 0.0)
                gradient = gradient * found.before[None, :] + dot(scores, found.weights * gain, variant)
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
        part = -tl.sum(tl.where(decays == 0.0, 0.0, decays * response), axis=0)
        channels = channel + tl.arange(0, variant.block_width)
        tl.store(gradients.responses + unit * variant.width + channels, part, mask=channels < variant.width)


@triton.jit
def sum_back(problem, gradients, variant: tl.constexpr):
    """A chunk's own part of G before it: sum over its rows of exp(z_in - z_t) scale q_t do_t^T."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    tiles: tl.constexpr = (variant.value_width + variant.block_value_width - 1) // variant.block_value_width
    channel = tl.program_id(2) // tiles * variant.block_width
    column = tl.program_id(2) % tiles * variant.block_value_width
    index = tl.arange(0, variant.rows)
    within = index < chunk.rows
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    if variant.causal:
        live = takes_part(problem, variant, chunk, index)
        z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
        keys = load_keys(problem, variant, chunk, key_head, live, channel)
        decays = decays_from_start(problem, variant, chunk, key_head, channel, keys, z)
    else:
        z = load_channels(problem.final_log_normalizer, own, channel, variant, -float("inf"))
        decays = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
        decays += tl.where(z == -float("inf"), 0.0, 1.0)[None, :]
    total = tl.full((variant.block_width, variant.block_value_width), 0.0, tl.float32)
    for member in tl.range(0, problem.group):
        head = key_head * problem.group + member
        queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
        queries = tl.where(decays == 0.0, 0.0, queries * decays) * problem.scale
        received = load_grad_output(problem, gradients, variant, chunk, head, within, column)
        total += dot(tl.trans(queries), received, variant)
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
            tl.store(places, gradient, mask=inside)
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


@triton.jit
def retreat(problem, gradients, variant: tl.constexpr, chunk, key_head, row, channel, column, z, decay, state_gradient):
    """G_t from G_{t+1}, with z_{t-1} and exp(z_t - z_{t+1}); also exp(x_t - z_t) and exp(z_{t-1} - z_t).

    Both are taken as shares of a sum, which is exact where a difference of large logarithms is not.
    """
    live = takes_part(problem, variant, chunk, row)
    key = load_key_row(problem, variant, chunk, key_head, row, live, channel)
    now, past, weight = add_logs(z, key)
    dead = now == -float("inf")
    state_gradient = tl.where((decay == 0.0)[:, None], 0.0, decay[:, None] * state_gradient)
    for member in tl.range(0, problem.group):
        head = key_head * problem.group + member
        query = load_row(problem.query, chunk, head, row, row >= 0, channel, variant.width, variant.block_width)
        received = load_row(
            gradients.grad_output, chunk, head, row, row >= 0, column, variant.value_width, variant.block_value_width
        )
        query = tl.where(dead, 0.0, query * problem.scale)
        state_gradient += tl.where(dead[:, None], 0.0, query[:, None] * received[None, :])
    return weight, past, state_gradient


@triton.jit
def before_row(own_z, z, row):
    """z_{t-1}, from z_t of all rows and that before the first."""
    return tl.where(row == 0, z, row_of(own_z, row - 1))


@triton.jit
def queries_are_finite(problem, variant: tl.constexpr, chunk, key_head, within, channel):
    finite = channel >= 0
    for member in tl.range(0, problem.group):
        head = key_head * problem.group + member
        finite = finite & all_finite(
            load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
        )
    return finite


@triton.jit
def key_gradients(problem, gradients, grad_key, grad_gain, variant: tl.constexpr):
    """dx and the gain's gradient in one chunk, a tile of channels."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    channel = tl.program_id(2) * variant.block_width
    index = tl.arange(0, variant.rows)
    within = index < chunk.rows
    live = takes_part(problem, variant, chunk, index)
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    keys = load_keys(problem, variant, chunk, key_head, live, channel)
    received = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)  # exp(x_t - z_t) G_t v_t
    if variant.causal:
        z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
        found = weigh_keys(keys, z)
        response = load_channels(gradients.responses, unit, channel, variant, 0.0)
        own_responses = load_tile(
            gradients.query_responses, chunk, key_head, within, channel, variant.width, variant.block_width
        )
        if found.fast & queries_are_finite(problem, variant, chunk, key_head, within, channel):
            last = row_of(found.inverse, variant.rows - 1)
            for column in tl.range(0, variant.value_width, variant.block_value_width):
                values = load_tile(
                    problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
                )
                state_gradient = load_state(gradients.state_gradients, unit, channel, column, variant)
                received += dot(values, tl.trans(state_gradient), variant)
            received = received * last[None, :]
            for member in tl.range(0, problem.group):
                head = key_head * problem.group + member
                scores = tl.full((variant.rows, variant.rows), 0.0, tl.float32)
                for column in tl.range(0, variant.value_width, variant.block_value_width):
                    values = load_tile(
                        problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
                    )
                    given = load_grad_output(problem, gradients, variant, chunk, head, within, column)
                    scores += dot(values, tl.trans(given), variant)
                scores = tl.where(index[None, :] >= index[:, None], scores, 0.0)
                queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
                received += dot(scores, queries * found.inverse * problem.scale, variant)
            received = received * found.weights
            parts = tl.where(found.inverse == 0.0, 0.0, own_responses * found.inverse)
            responses = found.weights * (last * response)[None, :]
            responses -= found.weights * tl.cumsum(parts, axis=0, reverse=True)
        else:
            responses = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
            own_z = walk_log_normalizers(problem, variant, chunk, key_head, channel, z)
            for column in tl.range(0, variant.value_width, variant.block_value_width):
                state_gradient = load_state(gradients.state_gradients, unit, channel, column, variant)
                decay = tl.full((variant.block_width,), 1.0, tl.float32)  # G after the chunk is in units of its end
                carried = response
                for step in tl.range(0, chunk.rows):
                    row = chunk.rows - 1 - step
                    carried = tl.where(decay == 0.0, 0.0, decay * carried) - row_of(own_responses, row)
                    weight, decay, state_gradient = retreat(
                        problem,
                        gradients,
                        variant,
                        chunk,
                        key_head,
                        row,
                        channel,
                        column,
                        before_row(own_z, z, row),
                        decay,
                        state_gradient,
                    )
                    value = load_row(
                        problem.value,
                        chunk,
                        key_head,
                        row,
                        takes_part(problem, variant, chunk, row),
                        column,
                        variant.value_width,
                        variant.block_value_width,
                    )
                    part = tl.where(weight == 0.0, 0.0, weight * tl.sum(state_gradient * value[None, :], axis=1))
                    here = (index == row)[:, None]
                    received += tl.where(here, part[None, :], 0.0)
                    if column == 0:
                        part = tl.where(weight == 0.0, 0.0, weight * carried)
                        responses = tl.where(here, part[None, :], responses)
    else:
        weights = weigh_finally(problem, variant, own, channel, keys)
        for column in tl.range(0, variant.value_width, variant.block_value_width):
            values = load_tile(
                problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
            )
            state_gradient = load_state(gradients.first_state_gradient, own, channel, column, variant)
            received += dot(values, tl.trans(state_gradient), variant)
        received = received * weights
        responses = weights * load_channels(gradients.first_response, own, channel, variant, 0.0)[None, :]
    gain = load_gain(problem, variant, chunk, key_head, live, channel)
    gradient = tl.where(live[:, None], gain * received + responses, 0.0)
    store_tile(grad_key, chunk, key_head, channel, gradient, variant.width, variant.block_width)
    if variant.has_gain:
        received = tl.where(live[:, None], received, 0.0)
        store_tile(grad_gain, chunk, key_head, channel, received, variant.width, variant.block_width)


@triton.jit
def walk_value_gradients(problem, gradients, variant: tl.constexpr, chunk, key_head, channel, column, z):
    """The part of a tile of channels in dv of a chunk, row by row: (rows, columns)."""
    index = tl.arange(0, variant.rows)
    unit = chunk.index * problem.key_heads + key_head
    total = tl.full((variant.rows, variant.block_value_width), 0.0, tl.float32)
    own_z = walk_log_normalizers(problem, variant, chunk, key_head, channel, z)
    decay = tl.full((variant.block_width,), 1.0, tl.float32)  # G after the chunk is in units of its end
    state_gradient = load_state(gradients.state_gradients, unit, channel, column, variant)
    for step in tl.range(0, chunk.rows):
        row = chunk.rows - 1 - step
        weight, decay, state_gradient = retreat(
            problem,
            gradients,
            variant,
            chunk,
            key_head,
            row,
            channel,
            column,
            before_row(own_z, z, row),
            decay,
            state_gradient,
        )
        if variant.has_gain:
            weight = weight * load_row(
                problem.key_gain,
                chunk,
                key_head,
                row,
                takes_part(problem, variant, chunk, row),
                channel,
                variant.width,
                variant.block_width,
            )
        part = tl.sum(tl.where((weight == 0.0)[:, None], 0.0, weight[:, None] * state_gradient), axis=0)
        total = tl.where((index == row)[:, None], part[None, :], total)
    return total


@triton.jit
def value_gradients(problem, gradients, grad_value, variant: tl.constexpr):
    """dv in one chunk, a tile of value columns."""
    chunk = find_chunk(problem, variant, tl.program_id(0))
    key_head = tl.program_id(1)
    column = tl.program_id(2) * variant.block_value_width
    index = tl.arange(0, variant.rows)
    within = index < chunk.rows
    live = takes_part(problem, variant, chunk, index)
    unit = chunk.index * problem.key_heads + key_head
    own = chunk.sequence * problem.key_heads + key_head
    total = tl.full((variant.rows, variant.block_value_width), 0.0, tl.float32)
    if variant.causal:
        finite = column >= 0
        for member in tl.range(0, problem.group):
            head = key_head * problem.group + member
            finite = finite & all_finite(load_grad_output(problem, gradients, variant, chunk, head, within, column))
        for channel in tl.range(0, variant.width, variant.block_width):
            z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
            found = weigh_keys(load_keys(problem, variant, chunk, key_head, live, channel), z)
            if found.fast & finite:
                gain = load_gain(problem, variant, chunk, key_head, live, channel)
                last = row_of(found.inverse, variant.rows - 1)
                state_gradient = load_state(gradients.state_gradients, unit, channel, column, variant)
                total += dot(found.weights * gain * last[None, :], state_gradient, variant)
            else:
                total += walk_value_gradients(problem, gradients, variant, chunk, key_head, channel, column, z)
        for member in tl.range(0, problem.group):
            head = key_head * problem.group + member
            scores = tl.full((variant.rows, variant.rows), 0.0, tl.float32)
            for channel in tl.range(0, variant.width, variant.block_width):
                z = load_channels(problem.log_normalizers, unit, channel, variant, -float("inf"))
                found = weigh_keys(load_keys(problem, variant, chunk, key_head, live, channel), z)
                if found.fast & finite:
                    gain = load_gain(problem, variant, chunk, key_head, live, channel)
                    queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
                    queries = tl.where(found.inverse == 0.0, 0.0, queries * found.inverse) * problem.scale
                    scores += dot(found.weights * gain, tl.trans(queries), variant)
            if finite:
                scores = tl.where(index[None, :] >= index[:, None], scores, 0.0)
                given = load_grad_output(problem, gradients, variant, chunk, head, within, column)
                total += dot(scores, given, variant)
    else:
        for channel in tl.range(0, variant.width, variant.block_width):
            keys = load_keys(problem, variant, chunk, key_head, live, channel)
            weights = weigh_finally(problem, variant, own, channel, keys)
            gain = load_gain(problem, variant, chunk, key_head, live, channel)
            state_gradient = load_state(gradients.first_state_gradient, own, channel, column, variant)
            total += dot(weights * gain, state_gradient, variant)
    total = tl.where(live[:, None], total, 0.0)
    store_tile(grad_value, chunk, key_head, column, total, variant.value_width, variant.block_value_width)
