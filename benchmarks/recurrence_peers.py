"""What the benchmark of the additive recurrence compares: implementations and the passes over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

import sightline as sl

CHUNK = 64
Result = TypeVar("Result")


def chunked_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """MATH.md section 4 in plain PyTorch: logcumsumexp, then matrix products chunk by chunk. Not for steep keys."""
    key, value_sums = key.float(), None
    z = key.logcumsumexp(2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    outputs, last = [], None
    for q, x, v, z_chunk in zip(*(part.split(CHUNK, 2) for part in (query, key, value, z)), strict=True):
        end = z_chunk[:, :, -1:]
        scaled, weights, v = q.float() * (end - z_chunk).exp(), (x - end).exp(), v.float()
        scores = (scaled @ weights.mT).masked_fill(later[: q.shape[2], : q.shape[2]], 0)
        output = scores @ v
        if value_sums is None:
            value_sums = weights.mT @ v
        else:
            value_sums = (last - end).exp().mT * value_sums
            output = output + scaled @ value_sums
            value_sums = value_sums + weights.mT @ v
        outputs.append(output)
        last = end
    return torch.cat(outputs, 2).to(query.dtype)


def two_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The matrix products that the unordered form cannot do without."""
    return query @ (key.mT @ value)


CAUSAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "recurrence": sl.additive_recurrence,
    "formula": chunked_formula,
    "sdpa": partial(functional.scaled_dot_product_attention, is_causal=True),
}
UNORDERED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "recurrence": partial(sl.additive_recurrence, causal=False),
    "products": two_products,
}


def random_inputs(heads: int, length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (1, H, N, D) from a normal distribution with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, width, generator=generator).to(dtype) for _ in range(3))
    return query, key, value


def forward_pass(function: Callable[..., Result], inputs: tuple[object, ...]) -> Callable[[], Result]:
    """A call that runs the forward pass alone, without recording it for gradients."""

    def run() -> Result:
        with torch.inference_mode():
            return function(*inputs)

    return run


def backward_pass(inputs: tuple[Tensor, ...], causal: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the backward pass of the recurrence alone."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    output = sl.additive_recurrence(*leaves, causal=causal)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def decoding_steps(batch: int, heads: int, width: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One token with its state, and what reads and writes as much memory: a sum of the state and a number.

    Each of them also on a state of one number: what a call costs that has nothing to do.
    """

    def step(batch: int, heads: int, width: int) -> tuple[Callable[[], object], Tensor]:
        query, key, value = (torch.randn(batch, heads, 1, width).to(dtype) for _ in range(3))
        state = sl.RecurrenceState(torch.randn(batch, heads, width), torch.randn(batch, heads, width, width))
        call = partial(sl.additive_recurrence, query, key, value, initial_state=state, output_final_state=True)
        return forward_pass(call, ()), state.memory

    recurrence, memory = step(batch, heads, width)
    smallest, number = step(1, 1, 1)
    return {
        "recurrence": recurrence,
        "memory": forward_pass(torch.add, (memory, 1.0)),
        "recurrence call": smallest,
        "memory call": forward_pass(torch.add, (number, 1.0)),
    }


def layered_decoding_steps(
    layers: int, batch: int, heads: int, width: int, dtype: torch.dtype
) -> dict[str, Callable[[], list[Tensor]]]:
    """One token through the recurrences of so many layers: each has its own state, which a new one replaces.

    And what reads and writes as much memory: a sum of each state and a number. Both return the last states.
    """
    query, key, value = (torch.randn(batch, heads, 1, width).to(dtype) for _ in range(3))
    sizes = [(batch, heads, width), (batch, heads, width, width)]
    states = [sl.RecurrenceState(*map(torch.randn, sizes)) for _ in range(layers)]
    memories = [state.memory.clone() for state in states]

    def recurrence() -> list[Tensor]:
        for layer, state in enumerate(states):
            _, states[layer] = sl.additive_recurrence(query, key, value, initial_state=state, output_final_state=True)
        return [state.memory for state in states]

    def memory() -> list[Tensor]:
        for layer, held in enumerate(memories):
            memories[layer] = held + 1.0
        return list(memories)

    return {"recurrence": forward_pass(recurrence, ()), "memory": forward_pass(memory, ())}
