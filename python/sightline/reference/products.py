"""The two matrix products of attention, in which a non-finite operand cannot leak through a weight of zero.

A plain matmul computes 0 * NaN. Here a zero weight selects its operand away, as the rule for non-finite inputs asks, in
the products themselves and in their derivatives, which are again these two products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _is_readable(x: Tensor) -> bool:
    """Whether Python may branch on the numbers in x: not while they are traced, mapped or only pretended."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # A mode that takes every operator may trace (make_fx) or only pretend (FakeTensorMode); so may a tensor subclass.
    return not x.is_meta and type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


class PairProduct(torch.autograd.Function):
    """p_ij = <x_i, y_j> for x (..., I, D) and y (..., J, D): each entry on its own, so that nothing leaks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return weighted_sum(grad, y), weighted_sum(grad.mT, x)


class WeightedSum(torch.autograd.Function):
    """o_i = sum over the j with w_ij != 0 of w_ij y_j, for w (..., I, J) and y (..., J, D)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, y: Tensor) -> Tensor:
        finite = y.isfinite()
        if _is_readable(y) and finite.all():
            return w @ y
        # Sum the finite entries; then count, entry by entry, what infinities and NaNs meet a weight that is not zero.
        above, below = (w > 0).to(y.dtype), (w < 0).to(y.dtype)
        plus, minus, undefined = (y == torch.inf).to(y.dtype), (y == -torch.inf).to(y.dtype), y.isnan().to(y.dtype)
        total = w @ torch.where(finite, y, 0)
        to_plus = above @ plus + below @ minus > 0
        to_minus = above @ minus + below @ plus > 0
        to_undefined = (above + below) @ undefined > 0
        total = torch.where(to_plus, total + torch.inf, total)
        total = torch.where(to_minus, total - torch.inf, total)
        return torch.where(to_undefined, torch.nan, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        w, y = ctx.saved_tensors
        return pair_product(grad, y), weighted_sum(w.mT, grad)


def pair_product(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j> as (..., I, J) for x (..., I, D) and y (..., J, D)."""
    return PairProduct.apply(x, y)


def weighted_sum(w: Tensor, y: Tensor) -> Tensor:
    """sum_j w_ij y_j as (..., I, D) for w (..., I, J) and y (..., J, D), without the j whose weight is zero."""
    return WeightedSum.apply(w, y)
