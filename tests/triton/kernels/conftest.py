from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sightline.ops.backends import INTERPRETS_TRITON

KERNEL_DIRECTORY = os.path.dirname(__file__)


if INTERPRETS_TRITON:
    from triton_interpreter import speed_up

    speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETS_TRITON:
        for item in items:
            if os.path.dirname(str(item.path)) == KERNEL_DIRECTORY:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter is kinder than a GPU, it does as a GPU does.

    Products of tf32 read the first ten bits of an operand's mantissa and drop the others, and the larger of a number
    and NaN is the number.
    """
    if not INTERPRETS_TRITON:
        return
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, left: Any, right: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32:
            left, right = (TensorHandle(first_ten_bits(factor.data), factor.dtype) for factor in (left, right))
        return multiply(self, left, right, total, precision, imprecise)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    for name, choose in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            InterpreterBuilder, name, lambda self, left, right, choose=choose: self.binary_op(left, right, choose)
        )


def first_ten_bits(numbers: np.ndarray) -> np.ndarray:
    cut = (np.ascontiguousarray(numbers).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(numbers), numbers, cut)


@pytest.fixture(autouse=True)
def tensors_where_the_kernels_run() -> Iterator[None]:
    """Tests say nothing about devices: on hardware all their tensors are made there."""
    if INTERPRETS_TRITON:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
