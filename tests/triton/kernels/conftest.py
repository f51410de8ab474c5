from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sightline.ops.backends import INTERPRETS_TRITON

KERNEL_DIRECTORY = os.path.dirname(__file__)


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
