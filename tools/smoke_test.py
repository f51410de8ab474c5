"""What must work right after `pip install sightline`, run outside the checkout by .ci/run: import, forward and backward
of each weighting and of the recurrence against the fp64 reference, and the command line.

    python -I tools/smoke_test.py
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

import sightline as sl
from sightline import reference

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Bounds on the relative Frobenius error in fp32, of outputs and of gradients.
WEIGHTINGS = {
    sl.Softmax(): (1e-5, 3e-5),
    sl.Softmax(length_scale=True, softcap=20.0): (1e-5, 3e-5),
    sl.LSSA(): (1e-5, 3e-5),
    sl.LSSAR(): (1e-4, 3e-4),
    sl.LSSAR(power=3.0): (1e-4, 3e-4),
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check_weighting(weighting: object, output_bound: float, gradient_bound: float) -> None:
    def native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sl.attention(query, key, value, weighting=weighting, causal=True, backend="native")

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return reference.attention(query, key, value, weighting=weighting, causal=True)[0]

    check(str(weighting), native, exact, 65, output_bound, gradient_bound)


def check_recurrence() -> None:
    def native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        begun, state = sl.additive_recurrence(
            *(tensor[:, :, :-1] for tensor in (query, key, value)), output_final_state=True, backend="native"
        )
        last = [tensor[:, :, -1:] for tensor in (query, key, value)]
        return torch.cat([begun, sl.additive_recurrence(*last, initial_state=state, backend="native")], 2)

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return reference.additive_recurrence(query, key, value)[0]

    check("additive_recurrence, the last token from the state", native, exact, 130, 1e-5, 3e-5)


def check(name: str, native: Call, exact: Call, queries: int, output_bound: float, gradient_bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 64), (2, 2, 130, 64), (2, 2, 130, 32), (2, 4, queries, 32))
    *inputs, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]

    output, expected = native(*leaves), exact(*exact_leaves)
    gradients = torch.autograd.grad(output, leaves, upstream)
    expected_gradients = torch.autograd.grad(expected, exact_leaves, upstream.double())

    error = relative_error(output.detach(), expected.detach())
    gradient_error = max(map(relative_error, gradients, expected_gradients))
    print(f"{name}: relative error {error:.1e}, of gradients {gradient_error:.1e}", flush=True)
    # Written so that NaN fails.
    if not (error <= output_bound and gradient_error <= gradient_bound):
        raise SystemExit(f"smoke test: {name} is out of bounds ({output_bound}, {gradient_bound})")


def main() -> None:
    if not Path(sl.__file__).is_relative_to(sysconfig.get_path("platlib")):
        raise SystemExit(f"smoke test: sightline comes from {sl.__file__}, not from the installed wheel")
    for weighting, bounds in WEIGHTINGS.items():
        check_weighting(weighting, *bounds)
    check_recurrence()
    command = Path(sysconfig.get_path("scripts"), "sightline")
    for arguments in (["--version"], ["info"]):
        subprocess.run([command, *arguments], check=True)
    subprocess.run([sys.executable, "-m", "sightline", "--version"], check=True)


if __name__ == "__main__":
    main()
