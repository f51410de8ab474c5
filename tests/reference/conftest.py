from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.weighting import LSSA, LSSAR, Reweight, Softmax, Softplus

WEIGHTINGS = {
    "softmax": Softmax(),
    "ssmax": Softmax(length_scale=True),
    "capped": Softmax(softcap=1.5),
    "cosine": Softmax(normalize_qk=True),
    "sharp_softmax": Softmax(reweight=Reweight(power=2.5, offset=0.5)),
    "lssa": LSSA(),
    "raw_softplus": Softplus(length_scale=False, normalize_qk=False),
    "lssar": LSSAR(),
    "lssar1": LSSAR(1.0),
    "lssar3": LSSAR(3.0),
}


@pytest.fixture(params=WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
def weighting(request: pytest.FixtureRequest) -> Any:
    """Every weighting in turn, unless the test names its own."""
    return request.param


def _random_inputs(
    queries: int = 7,
    keys: int = 9,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    width: int = 6,
    value_width: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, queries, width, dtype=torch.float64),
        torch.randn(batch, key_heads, keys, width, dtype=torch.float64),
        torch.randn(batch, key_heads, keys, value_width, dtype=torch.float64),
    )


@pytest.fixture
def random_inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Draws query (B, H, M, D), key (B, Hk, N, D) and value (B, Hk, N, Dv) in float64."""
    return _random_inputs
