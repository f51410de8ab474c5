"""Multi-dimensional positions of LightNet: MD-LRPE, a rotation of queries and keys, and MD-TPE, a filter of the input.

Both take any number of axes. Source: "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
arXiv 2405.21022; docs/MATH.md section 4, "Positions".
"""

from __future__ import annotations

import torch
from torch import Tensor

from sightline._checks import _shape, _wrong_type
from sightline._size_checks import check_count

_BASE = 10000.0


def grid_positions(*sizes: int, leading: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The positions (leading + sizes[0] * ... * sizes[k-1], k) of a grid's cells in row-major order, int64.

    The first `leading` tokens (class or condition tokens in front of the grid) stand at 0 on every axis, where the
    rotation of `md_lrpe` is none.

    Raises TypeError or ValueError for sizes or `leading` that are not whole numbers of at least 0, or no size at all.

    >>> grid_positions(2, 3, leading=1).tolist()
    [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    """
    for name, number in (*(("sizes", size) for size in sizes), ("leading", leading)):
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise _wrong_type(name, "a whole number of at least 0", number)
        if number < 0:
            raise ValueError(f"{name}: expected a whole number of at least 0, got {number}")
    if not sizes:
        raise ValueError("sizes: expected the size of at least one axis, got none")
    axes = [torch.arange(size, device=device) for size in sizes]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    return torch.cat([grid.new_zeros(leading, len(sizes)), grid])


def lrpe_frequencies(width: int, axes: int = 1, *, device: torch.device | str | None = None) -> Tensor:
    """theta of `md_lrpe`, radians per step: (ceil(D / k),) float32 for head width D and k axes.

    theta_i = 10000^(-2i/D) with one axis; with several each axis has the frequencies of its own share of the width.

    Raises TypeError or ValueError for a width or axes that are not whole numbers of at least 1.

    >>> lrpe_frequencies(4)
    tensor([1.0000e+00, 1.0000e-02, 1.0000e-04, 1.0000e-06])
    >>> lrpe_frequencies(4, axes=2).shape
    torch.Size([2])
    """
    check_count("width", width)
    check_count("axes", axes)
    share = -(-width // axes)
    return (_BASE ** (-2.0 * torch.arange(share, dtype=torch.float64, device=device) / share)).float()


def lrpe_angles(positions: Tensor, theta: Tensor, width: int) -> Tensor:
    """Theta = concat_j(s_j theta)[:D] in radians: (..., N, D) for positions (..., N, k) and theta (e,).

    In float64, so that position 1,000,000 still has the angle that sets it apart from the next.

    Raises TypeError or ValueError for anything but real tensors on one device with k e >= D.

    >>> lrpe_angles(torch.tensor([[2, 3]]), torch.tensor([1.0, 0.5]), 3)
    tensor([[2., 1., 3.]], dtype=torch.float64)
    """
    check_count("width", width)
    for name, tensor in (("positions", positions), ("theta", theta)):
        if not isinstance(tensor, Tensor):
            raise _wrong_type(name, "a tensor", tensor)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers or real numbers, got {tensor.dtype}")
    if positions.dim() < 2 or positions.shape[-1] < 1:
        raise ValueError(f"positions: expected shape (..., N, axes) with at least 1 axis, got {_shape(positions)}")
    if theta.dim() != 1:
        raise ValueError(f"theta: expected one axis of frequencies, got shape {_shape(theta)}")
    axes = positions.shape[-1]
    if axes * theta.shape[0] < width:
        raise ValueError(
            f"theta: expected at least {-(-width // axes)} frequencies for head width {width} and {axes} axes, "
            f"got {theta.shape[0]}"
        )
    _check_device("theta", theta, "positions", positions)
    return (positions.unsqueeze(-1).double() * theta.double()).flatten(-2)[..., :width]


def md_lrpe(
    query: Tensor, key: Tensor, positions: Tensor, theta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """MD-LRPE: query, key and key_gain of `sightline.additive_recurrence` that carry positions on k axes.

    The query becomes [q cos Theta, q sin Theta], the raw keys [x, x], with gain [cos Theta, sin Theta], all of width
    2 D; the product of a query at t and a key at s is thereby weighted with cos(Theta_t - Theta_s) per channel.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, N, D), logits.
        positions: (N, k), or (B, N, k); see `grid_positions`.
        theta: (e,) frequencies in radians per step with k e >= D, which may need a gradient; `lrpe_frequencies` by
            default.

    Returns:
        query (B, H, N, 2 D) and key (B, Hk, N, 2 D) in their dtypes, key_gain (B, Hk, N, 2 D) in float32, or in
        float64 for queries in float64. The recurrence takes widths up to 512, so D up to 256.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or is on another device; the message names it.

    >>> import sightline as sl
    >>> query, key, value = torch.randn(3, 1, 4, 10, 16).unbind()
    >>> query, key, gain = sl.position.md_lrpe(query, key, sl.position.grid_positions(3, 3, leading=1))
    >>> sl.additive_recurrence(query, key, value, key_gain=gain, causal=False).shape
    torch.Size([1, 4, 10, 16])
    """
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise _wrong_type(name, "a tensor", tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 axes (B, heads, N, D), got shape {_shape(tensor)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {str(tensor.dtype).removeprefix('torch.')}")
    batch, _, length, width = query.shape
    if key.shape[3] != width:
        raise ValueError(f"key: expected head width {width} as in query, got {key.shape[3]}")
    if key.shape[0] != batch or key.shape[2] != length:
        raise ValueError(f"key: expected shape ({batch}, Hk, {length}, {width}) as query has, got {_shape(key)}")
    if not isinstance(positions, Tensor):
        raise _wrong_type("positions", "a tensor", positions)
    leading = positions.shape[0] if positions.dim() == 3 else 1
    fits = positions.dim() in (2, 3) and positions.shape[-2] == length and leading in (1, batch)
    if not fits or positions.shape[-1] < 1:
        raise ValueError(
            f"positions: expected shape (N, axes) or (B, N, axes) with N = {length}, B = {batch} and at least 1 axis, "
            f"got {_shape(positions)}"
        )
    _check_device("key", key, "query", query)
    _check_device("positions", positions, "query", query)
    if theta is None:
        theta = lrpe_frequencies(width, positions.shape[-1], device=query.device)
    angles = lrpe_angles(positions, theta, width).unsqueeze(-3)  # ([B,] 1, N, D): entries share theirs
    rotation = torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.promote_types(query.dtype, torch.float32))
    doubled = torch.cat([query, query], dim=-1)
    gain = rotation.expand(batch, key.shape[1], length, 2 * width)
    return (doubled * rotation).to(query.dtype), torch.cat([key, key], dim=-1), gain


def md_tpe(x: Tensor, coefficient: Tensor, decay: Tensor) -> Tensor:
    """MD-TPE: the sum over the grid's axes of a causal filter along each, ``y_i = c sum_{m<=i} lambda^(i-m) x_m``.

    Args:
        x: (B, n_1, ..., n_k, C), channels last.
        coefficient: (H,), c of every head; the C channels are divided among the H heads in order.
        decay: (H,), lambda of every head, in [0, 1].

    Returns:
        A tensor like x. Computed by doubling the reach of the filter, in O(n log n) per axis, and in float32 at least:
        give coefficient and decay in float32 where x is in 16 bits.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or is on another device; the message names it.

    >>> x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 4, 1)
    >>> md_tpe(x, torch.tensor([3.0]), torch.tensor([0.5])).flatten()
    tensor([3.0000, 1.5000, 0.7500, 6.3750])
    """
    for name, tensor in (("x", x), ("coefficient", coefficient), ("decay", decay)):
        if not isinstance(tensor, Tensor):
            raise _wrong_type(name, "a tensor", tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {str(tensor.dtype).removeprefix('torch.')}")
    if x.dim() < 3:
        raise ValueError(f"x: expected shape (B, n_1, ..., n_k, C), got {_shape(x)}")
    heads = coefficient.shape[0] if coefficient.dim() == 1 else 0
    if heads < 1 or x.shape[-1] % heads != 0:
        raise ValueError(
            f"coefficient: expected shape (H,) with H a divisor of the {x.shape[-1]} channels, "
            f"got {_shape(coefficient)}"
        )
    if decay.shape != coefficient.shape:
        raise ValueError(f"decay: expected shape (H,) = ({heads},), got {_shape(decay)}")
    _check_device("coefficient", coefficient, "x", x)
    _check_device("decay", decay, "x", x)
    share = x.shape[-1] // heads
    # In 16 bits a decay near 1 is another decay after a few hundred positions, and every step of the sum rounds.
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, decays = x.to(dtype), decay.to(dtype).repeat_interleave(share)
    # A grid of one position decays nothing; its decay has a gradient all the same, of 0.
    nothing = decays[:0].sum()
    total = sum((_decayed_sum(wide, decays, axis) for axis in range(1, x.dim() - 1)), nothing)
    return (total * coefficient.to(dtype).repeat_interleave(share)).to(x.dtype)


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {tensor.device}")


def _decayed_sum(x: Tensor, decay: Tensor, axis: int) -> Tensor:
    """sum_{m<=i} decay^(i-m) x_m along an axis: after step j every entry has gathered 2^j of them."""
    length, reach = x.shape[axis], 1
    while reach < length:
        shifted = torch.zeros_like(x.narrow(axis, 0, reach))
        x = x + torch.cat([shifted, decay**reach * x.narrow(axis, 0, length - reach)], dim=axis)
        reach *= 2
    return x
