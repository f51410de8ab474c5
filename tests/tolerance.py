"""The tolerance rule of MATH.md, section 5: the one place that says how close to the reference is close enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FROBENIUS_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
REWEIGHTED_FLOAT32_BOUND = 1e-4
GRADIENT_FACTOR = 3
ELEMENT_FACTOR = 2
# Errors are heavy-tailed: of a few rows or numbers, and against the largest error that torch happens to make, now and
# then a draw misses a rule by chance. It may miss it by OUTLIER_FACTOR; others are then drawn until those that hold the
# rules and those that miss one are DECISIVE_LEAD apart.
OUTLIER_FACTOR = 4
DECISIVE_LEAD = 8


class Comparison(NamedTuple):
    """One result of a kernel, and what it is measured by.

    reference: the same in float64 from the same rounded inputs. reference_in_dtype: the reference run in the inputs'
    dtype, which says what error that dtype makes unavoidable. magnitude: where the reference is a sum over rows whose
    terms may cancel, the size that it would have if they did not; the error is then relative to it, and the comparison
    with torch, which adds in another order, means nothing for the few entries that remain.
    """

    actual: Tensor
    reference: Tensor
    reference_in_dtype: Tensor
    magnitude: Tensor | None = None


def assert_close_to_reference(
    comparison: Comparison,
    *,
    name: str = "output",
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    reweighted: bool = False,
    redraw: Callable[[int], Comparison] | None = None,
) -> None:
    """Assert both conditions: a relative Frobenius error, and an element-wise one against what torch itself makes.

    dtype: whose bound applies, by default that of the actual result. reweighted: LSSAR and its kin. redraw: the same of
    other random numbers each turn, called where a rule is missed.

    NaN never passes; infinities must stand where the reference has them.
    """
    dtype = comparison.actual.dtype if dtype is None else dtype
    bound = FROBENIUS_BOUND[dtype]
    if reweighted and dtype == torch.float32:
        bound = REWEIGHTED_FLOAT32_BOUND
    if gradient:
        bound *= GRADIENT_FACTOR
    excess, message = _excess(comparison, dtype, bound, name)
    if excess <= 1:
        return
    assert redraw is not None, message
    assert excess <= OUTLIER_FACTOR, message
    held = missed = 0
    while abs(held - missed) < DECISIVE_LEAD:
        holds = _excess(redraw(held + missed), dtype, bound, name)[0] <= 1
        held, missed = held + holds, missed + (not holds)
    assert held > missed, f"{message}, and {missed} of {held + missed} other draws do too"


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """The same sums in another order. In 16 bits an entry whose terms cancel is as exact as others of typical size."""
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected)
        return
    rounding = torch.finfo(expected.dtype).eps
    typical = float(expected.double().square().mean().sqrt())
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * typical)


def _excess(comparison: Comparison, dtype: torch.dtype, bound: float, name: str) -> tuple[float, str]:
    """The error as a multiple of what it may be, by the rule that is missed by most, and how to say it."""
    actual, reference, _, magnitude = comparison
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    infinite = reference.isinf()
    assert torch.equal(actual[infinite].double(), reference[infinite]), f"{name}: infinities differ"
    error = float((actual.double() - reference)[~infinite].norm())
    size = float((reference if magnitude is None else magnitude.double())[~infinite].norm())
    relative = _ratio(error, size)
    found = relative / bound, f"{name}: relative Frobenius error {relative:.2e} exceeds {bound:.1e}"
    if magnitude is None:
        largest, limit = _largest_errors(comparison, dtype)
        found = max(found, (_ratio(largest, limit), f"{name}: largest error {largest:.2e} exceeds {limit:.2e}"))
    return found


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else math.inf if size == 0 else error / size


def _largest_errors(comparison: Comparison, dtype: torch.dtype) -> tuple[float, float]:
    """The largest error of the kernel's finite entries, and what it may be."""
    reference = comparison.reference.detach()
    finite = ~reference.isinf()
    reference = reference[finite]
    if reference.numel() == 0:
        return 0.0, 0.0
    actual, torch_made = (tensor.detach()[finite].double() for tensor in (comparison[0], comparison[2]))
    rounding = ((reference.to(dtype) + 0.3) - 0.3).double() - reference
    unavoidable = float((torch_made - reference).abs().max()) + float(rounding.abs().max())
    return float((actual - reference).abs().max()), ELEMENT_FACTOR * unavoidable
