"""What the attention benchmarks compare: the implementations, their inputs, and the passes over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

import sightline as sl

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BASELINE = "sdpa"
IMPLEMENTATIONS: dict[str, Attention] = {
    "sdpa": partial(functional.scaled_dot_product_attention, is_causal=True),
    "softmax": partial(sl.attention, weighting=sl.Softmax(), causal=True),
    "lssa": partial(sl.attention, weighting=sl.LSSA(), causal=True),
    "lssar": partial(sl.attention, weighting=sl.LSSAR(), causal=True),
}
LABELS = {
    "sdpa": "torch SDPA",
    "softmax": "sightline Softmax",
    "lssa": "sightline LSSA",
    "lssar": "sightline LSSAR",
}


def random_inputs(heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Query, key and value (1, H, N, D) from a normal distribution with a fixed seed, in the dtype."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, width, generator=generator).to(device, dtype) for _ in range(3))
    return query, key, value


def forward_pass(attention: Attention, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A call that runs the forward pass alone, without recording it for gradients."""

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return attention(*inputs)

    return run


def backward_pass(attention: Attention, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the forward pass and the gradients of query, key and value from a fixed output gradient."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    generator = torch.Generator().manual_seed(1)
    output_gradient = torch.randn(inputs[2].shape, generator=generator).to(inputs[2])

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attention(*leaves), leaves, output_gradient)

    return run
