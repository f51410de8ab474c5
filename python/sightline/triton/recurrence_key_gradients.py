"""The additive recurrence, backward: what keys, gains and values receive (MATH.md section 4).

From G and r after every chunk, which recurrence_backward.py leaves behind; without order one G and r for all rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sightline.triton.recurrence_backward import load_grad_output
from sightline.triton.recurrence_chunk import (
    add_logs,
    all_finite,
    dot,
    find_chunk,
    load_channels,
    load_key_row,
    load_keys,
    load_row,
    load_state,
    load_tile,
    remainder,
    rounded,
    row_of,
    store_tile,
    takes_part,
    walk_log_normalizers,
    weigh_finally,
    weigh_keys,
)
from sightline.triton.recurrence_forward import load_gain


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
    """dx and, where it is wanted, the gain's gradient in one chunk, a tile of channels."""
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
            for column in tl.range(0, problem.columns, variant.block_value_width):
                values = load_tile(
                    problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
                )
                state_gradient = load_state(gradients.state_gradients, unit, channel, column, variant)
                received += dot(values, tl.trans(state_gradient), variant)
            received = received * last[None, :]
            for member in tl.range(0, problem.group):
                head = key_head * problem.group + member
                scores = tl.full((variant.rows, variant.rows), 0.0, tl.float32)
                for column in tl.range(0, problem.columns, variant.block_value_width):
                    values = load_tile(
                        problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
                    )
                    given = load_grad_output(problem, gradients, variant, chunk, head, within, column)
                    scores += dot(values, tl.trans(given), variant)
                scores = tl.where(index[None, :] >= index[:, None], scores, 0.0)
                queries = load_tile(problem.query, chunk, head, within, channel, variant.width, variant.block_width)
                queries = rounded(queries * found.inverse * problem.scale, variant)
                received += dot(rounded(scores, variant), queries, variant)
            received = received * found.weights
            parts = tl.where(found.inverse == 0.0, 0.0, own_responses * found.inverse)
            responses = found.weights * (last * response)[None, :]
            responses -= found.weights * tl.cumsum(parts, axis=0, reverse=True)
        else:
            responses = tl.full((variant.rows, variant.block_width), 0.0, tl.float32)
            own_z = walk_log_normalizers(problem, variant, chunk, key_head, channel, z)
            for column in tl.range(0, problem.columns, variant.block_value_width):
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
        for column in tl.range(0, problem.columns, variant.block_value_width):
            values = load_tile(
                problem.value, chunk, key_head, live, column, variant.value_width, variant.block_value_width
            )
            state_gradient = load_state(gradients.first_state_gradient, own, channel, column, variant)
            received += dot(values, tl.trans(rounded(state_gradient, variant)), variant)
            if variant.keeps_remainders:  # noqa: SIM102 - the compiler leaves out what follows a constant alone
                if all_finite(values):
                    received += dot(values, tl.trans(remainder(state_gradient, variant)), variant)
        received = received * weights
        responses = weights * load_channels(gradients.first_response, own, channel, variant, 0.0)[None, :]
    gain = load_gain(problem, variant, chunk, key_head, live, channel)
    gradient = tl.where(live[:, None], gain * received + responses, 0.0)
    store_tile(grad_key, chunk, key_head, channel, gradient, variant.width, variant.block_width)
    if grad_gain.data is not None:
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
                weights = rounded(found.weights * gain * last[None, :], variant)
                total += dot(weights, state_gradient, variant)
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
                    scores += dot(rounded(found.weights * gain, variant), tl.trans(rounded(queries, variant)), variant)
            if finite:
                scores = tl.where(index[None, :] >= index[:, None], scores, 0.0)
                given = load_grad_output(problem, gradients, variant, chunk, head, within, column)
                total += dot(rounded(scores, variant), given, variant)
    else:
        for channel in tl.range(0, variant.width, variant.block_width):
            keys = load_keys(problem, variant, chunk, key_head, live, channel)
            weights = weigh_finally(problem, variant, own, channel, keys)
            gain = load_gain(problem, variant, chunk, key_head, live, channel)
            state_gradient = load_state(gradients.first_state_gradient, own, channel, column, variant)
            total += dot(rounded(weights * gain, variant), rounded(state_gradient, variant), variant)
    total = tl.where(live[:, None], total, 0.0)
    store_tile(grad_value, chunk, key_head, column, total, variant.value_width, variant.block_value_width)
