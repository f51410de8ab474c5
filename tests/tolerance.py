"""The tolerance rule of MATH.md, section 5: the one place that says how close to the reference is close enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FROBENIUS_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
REWEIGHTED_FLOAT32_BOUND = 1e-4
GRADIENT_FACTOR = 3
ELEMENT_FACTOR = 2
# Both sides of the element-wise rule are the largest of a few heavy-tailed errors, and now and then a draw favours
# torch by chance. It may miss the rule by OUTLIER_FACTOR; others are then drawn until those that hold the rule and
# those that miss it are DECISIVE_LEAD apart.
OUTLIER_FACTOR = 4
DECISIVE_LEAD = 8


class Comparison(NamedTuple):
    """One result of a kernel, and what it is measured by.

    reference: the same in float64 from the same rounded inputs. reference_in_dtype: the reference run in the inputs'
    dtype, which says what error that dtype makes unavoidable.
    """

    actual: Tensor
    reference: Tensor
    reference_in_dtype: Tensor


def assert_close_to_reference(
    comparison: Comparison,
    *,
    name: str = "output",
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    reweighted: bool = False,
    magnitude: Tensor | None = None,
    redraw: Callable[[int], Comparison] | None = None,
) -> None:
    """Assert both conditions: a relative Frobenius error, and an element-wise one against what torch itself makes.

    dtype: whose bound applies, by default that of the actual result. reweighted: LSSAR and its kin. magnitude: where
    the reference is a sum over rows whose terms may cancel, the size that it would have if they did not; the error is
    then relative to it, and the comparison with torch, which adds in another order, means nothing for the few entries
    that remain. redraw: the same of other random numbers each turn, called where the element-wise rule fails.

    NaN never passes; infinities must stand where the reference has them.
    """
    actual, reference, _ = comparison
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    dtype = actual.dtype if dtype is None else dtype
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    infinite = reference.isinf()
    assert torch.equal(actual[infinite].double(), reference[infinite]), f"{name}: infinities differ"
    if infinite.all():
        return

    bound = FROBENIUS_BOUND[dtype]
    if reweighted and dtype == torch.float32:
        bound = REWEIGHTED_FLOAT32_BOUND
    if gradient:
        bound *= GRADIENT_FACTOR
    error = (actual.double() - reference)[~infinite].norm()
    size = (reference if magnitude is None else magnitude.double())[~infinite].norm()
    assert error <= bound * size, f"{name}: relative Frobenius error {float(error / size):.2e} exceeds {bound:.1e}"
    if magnitude is not None:
        return

    largest, limit = _largest_errors(comparison, dtype)
    message = f"{name}: largest error {largest:.2e} exceeds {limit:.2e}"
    if largest > limit:
        assert redraw is not None, message
        assert largest <= OUTLIER_FACTOR * limit, message
        held = missed = 0
        while abs(held - missed) < DECISIVE_LEAD:
            largest, limit = _largest_errors(redraw(held + missed), dtype)
            held, missed = held + (largest <= limit), missed + (largest > limit)
        assert held > missed, f"{message}, and {missed} of {held + missed} other draws do too"


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
