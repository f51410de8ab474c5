"""What compute-sanitizer watches: one call of every kernel on a small shape, compared with the reference.

compute-sanitizer --tool memcheck python -m gpu.sanitize
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import sightline as sl
from sightline.ops import decode_refusal

WEIGHTINGS = (sl.Softmax(), sl.LSSA(), sl.LSSAR())
ALLOWED_ERROR = 2e-2
LENGTHS = (70, 41)  # of two caches of 130 keys


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative Frobenius error."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(weighting: sl.Softmax | sl.Softplus, device: torch.device, backend: str = "triton") -> list[float]:
    """Relative errors of forward, the three gradients, and decoding, all at ragged sizes with grouped heads."""
    query, key, value = (
        torch.randn(2, heads, rows, 64, dtype=torch.float16, device=device)
        for heads, rows in ((4, 70), (2, 130), (2, 130))
    )
    upstream = torch.randn_like(query)
    results = []
    for name in (backend, "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        output = sl.attention(*leaves, weighting=weighting, causal=True, backend=name)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
    errors = [relative_error(actual, expected) for actual, expected in zip(*results, strict=True)]
    lengths = torch.tensor(LENGTHS, device=device)
    row = query[:, :, :1]
    decoders = [backend] if decode_refusal(row, key, value) is not None else [backend, "native"]
    with torch.no_grad():
        expected = sl.attention(row, key, value, weighting=weighting, key_lengths=lengths, backend="reference")
        for name in decoders:
            actual = sl.attention(row, key, value, weighting=weighting, key_lengths=lengths, backend=name)
            errors.append(relative_error(actual, expected))
    return errors


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


def main() -> None:
    """Call every kernel; a wrong result ends with an exception."""
    device = torch.device("cuda")
    calls: dict[str, Callable[[], list[float]]] = {
        str(weighting): partial(check, weighting, device) for weighting in WEIGHTINGS
    }
    for causal in (True, False):
        calls[f"recurrence, {causal=}"] = partial(check_recurrence, causal, device)
    for name, call in calls.items():
        errors = call()
        torch.cuda.synchronize()
        print(name, [f"{error:.1e}" for error in errors], flush=True)
        if not max(errors) <= ALLOWED_ERROR:
            raise ArithmeticError(f"{name}: relative errors {errors}, expected at most {ALLOWED_ERROR}")


if __name__ == "__main__":
    main()
