"""What the Triton kernels of the additive recurrence use; tools/triton_resources.py asks for its cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kernel_usage import DTYPES, Usage, compiling_only, products, registers_and_spills

from sightline.triton import recurrence_launch

KERNELS = (
    "sum_chunks",
    "scan_chunks",
    "recurrence_outputs",
    "query_gradients",
    "sum_back",
    "scan_back",
    "key_gradients",
    "value_gradients",
)


def measure(target: str, order: str, dtype: str, width: int) -> Iterator[Usage]:
    """The kernels of a forward and a backward call with every option, "causal" or "unordered"."""
    results: list[tuple[str, Any, Any]] = []
    with compiling_only(target, recurrence_launch, KERNELS, lambda *result: results.append(result)):
        query = torch.zeros(1, 4, 256, width, dtype=DTYPES[dtype])
        key = torch.zeros(1, 2, 256, width, dtype=DTYPES[dtype])
        mask, state = torch.ones(1, 256, dtype=torch.bool), torch.zeros(1, 2, width, width)
        arguments = (query, key, key, key.float(), mask, None, state[..., 0], state, order == "causal", 1.0)
        recurrence_launch.additive_recurrence(*arguments, True)
        recurrence_launch.additive_recurrence_backward(query, state[..., 0], state, *arguments, True, True)
    for name, variant, compiled in results:
        channels = f"{variant.block_width} x {variant.block_value_width}"
        tile = f"{variant.rows} rows, {channels}, {compiled.metadata.num_warps} warps"
        usage = registers_and_spills(compiled, target)
        yield Usage(target, name, order, dtype, width, tile, *usage, compiled.metadata.shared, products(compiled))
