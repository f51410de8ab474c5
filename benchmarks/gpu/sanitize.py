"""What compute-sanitizer watches: one call of every kernel on a small shape, compared with the reference.

compute-sanitizer --tool memcheck python -m gpu.sanitize [--native]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import sightline as sl
from sightline.ops import decode_refusal
from sightline.weighting import Weighting

WEIGHTINGS = (sl.Softmax(), sl.LSSA(), sl.LSSAR())
# Ragged sizes of one tile and of several, the second in the shapes that models have.
SHAPES = ((torch.float16, 64, 70, 130), (torch.bfloat16, 128, 300, 520))
ALLOWED_ERROR = 2e-2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative Frobenius error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(
    weighting: Weighting,
    device: torch.device,
    backend: str = "triton",
    shape: tuple[torch.dtype, int, int, int] = SHAPES[0],
) -> list[float]:
    """Relative errors of forward and the three gradients at ragged sizes with grouped heads."""
    dtype, width, queries, keys = shape
    query, key, value = (
        torch.randn(2, heads, rows, width, dtype=dtype, device=device)
        for heads, rows in ((4, queries), (2, keys), (2, keys))
    )
    upstream = torch.randn_like(query)
    results = []
    for name in (backend, "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = sl.attention(*leaves, weighting=weighting, causal=True, backend=name)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
    return [relative_error(actual, expected) for actual, expected in zip(*results, strict=True)]


def check_decoding(
    weighting: Weighting, device: torch.device, backend: str, shape: tuple[torch.dtype, int, int, int] = SHAPES[0]
) -> list[float]:
    """The relative error of one row against two ragged caches."""
    dtype, width, queries, keys = shape
    row = torch.randn(2, 4, 1, width, dtype=dtype, device=device)
    key, value = (torch.randn(2, 2, keys, width, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.tensor((queries, keys - 89), device=device)
    with torch.no_grad():
        actual, expected = (
            sl.attention(row, key, value, weighting=weighting, key_lengths=lengths, backend=name)
            for name in (backend, "reference")
        )
    return [relative_error(actual, expected)]


def check_recurrence(causal: bool, device: torch.device, backend: str = "triton") -> list[float]:
    """Relative errors of the additive recurrence and its three gradients, over chunks and a rest, grouped heads."""
    query, key, value = (torch.randn(2, heads, 150, 32, dtype=torch.float16, device=device) for heads in (4, 2, 2))
    upstream = torch.randn_like(query)
    results = []
    for name in (backend, "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = sl.additive_recurrence(*leaves, causal=causal, backend=name)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
    return [relative_error(actual, expected) for actual, expected in zip(*results, strict=True)]


def calls(device: torch.device, native: bool) -> dict[str, Callable[[], list[float]]]:
    """What is watched: every kernel, or the library's own CUDA kernels alone."""
    found: dict[str, Callable[[], list[float]]] = {}
    for shape in SHAPES:
        dtype, width, _, keys = shape
        row, cache = (torch.empty(2, 2, rows, width, dtype=dtype, device=device) for rows in (1, keys))
        with_native = decode_refusal(row, cache, cache) is None
        for weighting in WEIGHTINGS:
            name = f"{weighting}, {str(dtype).removeprefix('torch.')}, D = {width}"
            if with_native:
                found[f"decoding (CUDA), {name}"] = partial(check_decoding, weighting, device, "native", shape)
            if not native:
                found[name] = partial(check, weighting, device, shape=shape)
                found[f"decoding, {name}"] = partial(check_decoding, weighting, device, "triton", shape)
    if not native:
        for causal in (True, False):
            found[f"recurrence, {causal=}"] = partial(check_recurrence, causal, device)
    return found


def main() -> None:
    """Call every kernel; a wrong result ends with an exception."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", action="store_true", help="the library's own CUDA kernels alone")
    for name, call in calls(torch.device("cuda"), parser.parse_args().native).items():
        errors = call()
        torch.cuda.synchronize()
        print(name, [f"{error:.1e}" for error in errors], flush=True)
        if not max(errors) <= ALLOWED_ERROR:
            raise ArithmeticError(f"{name}: relative errors {errors}, expected at most {ALLOWED_ERROR}")


if __name__ == "__main__":
    main()
