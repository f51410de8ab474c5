"""MD-TPE as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sightline._checks import _shape, _wrong_type
from sightline._size_checks import check_count, check_divisor
from sightline.position import md_tpe


class ToeplitzPositions(nn.Module):
    """MD-TPE (arXiv 2405.21022): gives tokens of a grid their place by a decaying sum along every axis.

    Per head a learned query and key (`rank` numbers each, whose product is the filter's coefficient) and a decay
    lambda = sigmoid(.), which begins near 1 for the last head and at 1/2 for the first. Takes and returns
    (B, n_1, ..., n_k, embed_dim) for any k: see `sightline.position.md_tpe`.

    Args:
        embed_dim: width of input and output.
        num_heads: heads, a divisor of embed_dim; each filters its embed_dim / num_heads channels alike.
        rank: numbers in a head's query and key, which are (num_heads, rank).

    Raises:
        TypeError, ValueError: a size is not a whole number of at least 1, or num_heads does not divide embed_dim; the
            message names it.

    >>> ToeplitzPositions(12, num_heads=3)(torch.randn(2, 5, 4, 12)).shape
    torch.Size([2, 5, 4, 12])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, rank: int = 16) -> None:
        super().__init__()
        check_count("embed_dim", embed_dim)
        check_divisor("num_heads", num_heads, "embed_dim", embed_dim)
        check_count("rank", rank)
        self.embed_dim = embed_dim
        self.query = nn.Parameter(torch.empty(num_heads, rank))
        self.key = nn.Parameter(torch.empty(num_heads, rank))
        self.decay_logits = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw query and key so that their product has a variance of 1, and spread the decays."""
        std = self.query.shape[1] ** -0.25
        nn.init.normal_(self.query, std=std)
        nn.init.normal_(self.key, std=std)
        with torch.no_grad():
            self.decay_logits.copy_(torch.linspace(0.0, 4.0, self.decay_logits.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, n_1, ..., n_k, embed_dim) filtered along its k axes.

        Raises TypeError or ValueError for what is no floating tensor of that shape on the parameters' device.
        """
        if not isinstance(x, Tensor):
            raise _wrong_type("x", "a tensor", x)
        # The filter itself takes any width that the heads divide.
        if x.dim() < 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected shape (B, n_1, ..., n_k, {self.embed_dim}), got {_shape(x)}")
        # Parameters of 16 bits are what they are; the decay and the coefficient that follow from them are not rounded.
        dtype = torch.promote_types(self.decay_logits.dtype, torch.float32)
        query, key, logits = self.query.to(dtype), self.key.to(dtype), self.decay_logits.to(dtype)
        return md_tpe(x, (query * key).sum(-1), logits.sigmoid())
