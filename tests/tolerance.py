"""The tolerance rule of MATH.md, section 5: the one place that says how close to the reference is close enough."""

from __future__ import annotations

import torch
from torch import Tensor

FROBENIUS_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
REWEIGHTED_FLOAT32_BOUND = 1e-4
GRADIENT_FACTOR = 3
# How often the largest error may be torch's own: 2 by MATH.md. In float32 both are a few roundings, the largest of a
# heavy tail each: in 400 fresh draws of every case a few pass 4 and none 8, and a test must not fail by chance.
ELEMENT_FACTOR = {torch.float32: 8, torch.float16: 2, torch.bfloat16: 2}


def assert_close_to_reference(
    actual: Tensor,
    reference: Tensor,
    reference_in_dtype: Tensor,
    *,
    name: str = "output",
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    reweighted: bool = False,
    magnitude: Tensor | None = None,
) -> None:
    """Assert both conditions: a relative Frobenius error, and an element-wise one against what torch itself makes.

    actual: what a kernel made. reference: the same in float64 from the same rounded inputs. reference_in_dtype: the
    reference run in the inputs' dtype, which says what error that dtype makes unavoidable. dtype: whose bound applies,
    by default that of `actual`. reweighted: LSSAR and its kin. magnitude: where `reference` is a sum over rows whose
    terms may cancel, the size that it would have if they did not; the error is then relative to it, and the comparison
    with torch, which adds in another order, means nothing for the few entries that remain.

    NaN never passes; infinities must stand where the reference has them.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    dtype = actual.dtype if dtype is None else dtype
    actual, reference, torch_made = (tensor.detach().double() for tensor in (actual, reference, reference_in_dtype))
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    infinite = reference.isinf()
    assert torch.equal(actual[infinite], reference[infinite]), f"{name}: infinities differ from the reference's"
    actual, reference, torch_made = actual[~infinite], reference[~infinite], torch_made[~infinite]
    if actual.numel() == 0:
        return

    bound = FROBENIUS_BOUND[dtype]
    if reweighted and dtype == torch.float32:
        bound = REWEIGHTED_FLOAT32_BOUND
    if gradient:
        bound *= GRADIENT_FACTOR
    error = (actual - reference).norm()
    size = reference.norm() if magnitude is None else magnitude.double()[~infinite].norm()
    assert error <= bound * size, f"{name}: relative Frobenius error {float(error / size):.2e} exceeds {bound:.1e}"
    if magnitude is not None:
        return

    largest = (actual - reference).abs().max()
    unavoidable = (torch_made - reference).abs().max()
    rounding = (((reference.to(dtype) + 0.3) - 0.3).double() - reference).abs().max()
    limit = ELEMENT_FACTOR[dtype] * (GRADIENT_FACTOR if gradient else 1) * (unavoidable + rounding)
    assert largest <= limit, f"{name}: largest error {float(largest):.2e} exceeds {float(limit):.2e}"
