"""Compile the Triton kernels of the additive recurrence without a GPU, and fail where a register spills.

    python tools/recurrence_resources.py --arch 80 90 --dtype fp32 bf16 --width 64 128

Like tools/triton_resources.py, whose stand-in for the driver it uses: the library launches its kernels on memory that
is never read, and each launch compiles and stops there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime import driver
from triton_resources import DTYPES, SHARED_MEMORY, Architecture, _assembled

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


class CompileOnly:
    """A kernel whose launch compiles it and hands what came out to `keep`."""

    def __init__(self, kernel: Any, keep: list[tuple[str, Any]]) -> None:
        self.kernel, self.keep = kernel, keep

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            self.keep.append((self.kernel.fn.__name__, self.kernel.warmup(*arguments, grid=grid, **options)))

        return compile_it


def measure(arch: int, dtype: str, width: int, causal: bool) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, registers, spilled bytes, shared bytes) of a forward and a backward call with every option."""
    driver.set_active(Architecture(arch))
    compiled: list[tuple[str, Any]] = []
    originals = {name: getattr(recurrence_launch, name) for name in KERNELS}
    for name, kernel in originals.items():
        setattr(recurrence_launch, name, CompileOnly(kernel, compiled))
    try:
        query = torch.zeros(1, 4, 256, width, dtype=DTYPES[dtype])
        key = torch.zeros(1, 2, 256, width, dtype=DTYPES[dtype])
        mask, state = torch.ones(1, 256, dtype=torch.bool), torch.zeros(1, 2, width, width)
        arguments = (query, key, key, key.float(), mask, None, state[..., 0], state, causal, 1.0)
        recurrence_launch.additive_recurrence(*arguments, True)
        forward = len(compiled)
        recurrence_launch.additive_recurrence_backward(query, state[..., 0], state, *arguments, True, True)
        del compiled[forward : forward + 2]  # the states, computed again
    finally:
        for name, kernel in originals.items():
            setattr(recurrence_launch, name, kernel)
    for name, result in compiled:
        yield name, *_assembled(result, arch), result.metadata.shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--width", type=int, nargs="+", default=[32, 128, 256])
    arguments = parser.parse_args()
    spilled = False
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            for width in arguments.width:
                for causal in (True, False):
                    for name, registers, spill, shared in measure(arch, dtype, width, causal):
                        bad = spill > 0 or shared > SHARED_MEMORY[arch]
                        spilled |= bad
                        order = "causal" if causal else "unordered"
                        print(
                            f"{'SPILL' if bad else 'ok   '} sm_{arch} {dtype} D={width} {order} kernel={name} "
                            f"registers={registers} spilled={spill} shared={shared}",
                            flush=True,
                        )
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
