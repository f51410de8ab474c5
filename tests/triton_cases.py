"""What a Triton kernel is compiled for, without launching one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sightline.attention import weighting_scalars
from sightline.triton.arguments import Options, make_variant
from sightline.triton.problem import Variant


def variant_of(
    weighting: Any, *, length: int = 1000, width: int = 64, dtype: torch.dtype = torch.bfloat16, saves: bool = False
) -> Variant:
    """The variant of a causal call without further options."""
    query = torch.empty(1, 2, length, width, dtype=dtype, device="meta")
    scalars = (True, -1, -1, 0.1, 0.0, *weighting_scalars(weighting))
    variant = make_variant(query, query, Options(*[None] * 9, *scalars))
    return replace(variant, saves=saves)
