"""What the attention benchmarks compare: the implementations, their inputs, and the passes over them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

import sightline as sl

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BASELINE = "sdpa"
# What computes the baseline's function: its results are compared before it is timed.
SAME_FUNCTION = ("softmax", "zentorch")
# Relative Frobenius distance of two results that are each within the tolerance of docs/MATH.md, section 5.
LARGEST_DISTANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def implementations(causal: bool) -> dict[str, Attention]:
    """What is always there: torch SDPA and this library."""
    return {
        "sdpa": partial(functional.scaled_dot_product_attention, is_causal=causal),
        "softmax": partial(sl.attention, weighting=sl.Softmax(), causal=causal),
        "lssa": partial(sl.attention, weighting=sl.LSSA(), causal=causal),
        "lssar": partial(sl.attention, weighting=sl.LSSAR(), causal=causal),
    }


IMPLEMENTATIONS = implementations(causal=True)
LABELS = {
    "sdpa": "torch SDPA",
    "softmax": "sightline Softmax",
    "lssa": "sightline LSSA",
    "lssar": "sightline LSSAR",
    "zentorch": "zentorch",
}


def forward_peers(causal: bool) -> tuple[dict[str, Attention], dict[str, str]]:
    """Peers on the CPU that have only a forward pass and may be missing, and for each that is missing the reason."""
    if importlib.util.find_spec("zentorch") is None:
        return {}, {"zentorch": "not installed"}
    try:
        importlib.import_module("zentorch")
        operator = torch.ops.zentorch.zentorch_sdpa.default
    except Exception as error:
        return {}, {"zentorch": f"does not load here: {error}"}

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return operator(query, key, value, is_causal=causal)[0]

    return {"zentorch": attend}, {}


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius distance of two results, in float64.

    Example:
        >>> distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) < 0.2
        True
    """
    wide = expected.double()
    return ((result.double() - wide).norm() / wide.norm()).item()


def random_inputs(
    heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> Inputs:
    """Query, key and value (B, H, N, D) from a normal distribution with a fixed seed, in the dtype."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, length, width)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return query, key, value


def forward_pass(attention: Attention, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A call that runs the forward pass alone, without recording it for gradients."""

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return attention(*inputs)

    return run


def training_pass(attention: Attention, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the forward pass and the gradients of query, key and value from a fixed output gradient."""
    leaves, output_gradient = gradient_inputs(inputs)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attention(*leaves), leaves, output_gradient)

    return run


def backward_pass(attention: Attention, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the gradients alone: the forward pass is done here, once, and its graph is kept."""
    leaves, output_gradient = gradient_inputs(inputs)
    output = attention(*leaves)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, leaves, output_gradient, retain_graph=True)

    return run


def gradient_inputs(inputs: Inputs) -> tuple[Inputs, torch.Tensor]:
    """The inputs as leaves that want gradients, and a gradient of the output with a fixed seed."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    generator = torch.Generator().manual_seed(1)
    return (query, key, value), torch.randn(value.shape, generator=generator).to(value)
