from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sightline.ops.backends import INTERPRETS_TRITON

KERNEL_DIRECTORY = os.path.dirname(__file__)


def patch_language_once() -> None:
    """Saves the interpreter a third of its time.

    It replaces the functions of triton.language when a kernel is launched, and looks through all of them again at every
    call of a device function, where nothing is left to replace.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_unless_done(function: Any) -> Any:
        seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        return None if seen and not any(tl.core.is_builtin(module.load) for module in seen) else patch(function)

    interpreter._patch_lang = patch_unless_done


if INTERPRETS_TRITON:
    patch_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETS_TRITON:
        for item in items:
            if os.path.dirname(str(item.path)) == KERNEL_DIRECTORY:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def tensors_where_the_kernels_run() -> Iterator[None]:
    """Tests say nothing about devices: on hardware all their tensors are made there."""
    if INTERPRETS_TRITON:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
