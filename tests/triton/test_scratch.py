"""The memory that tile skipping takes stays within its bound at any length, and its launches fill the device."""

from __future__ import annotations

import doctest

import pytest
import torch

pytest.importorskip("triton")

from sightline.triton import skipping
from sightline.triton.skipping import SCRATCH_BYTES, make_scratch, plan_waves

PROCESSORS = 132


def test_doctests() -> None:
    failures, tests = doctest.testmod(skipping)
    assert failures == 0
    assert tests > 0


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("length", [2**power for power in range(10, 24)])
def test_no_length_takes_more_than_the_bound(length: int, rows: int) -> None:
    for programs in (1, 100, 512, 10**7):
        waves = plan_waves(programs, length // 64, rows, PROCESSORS)
        scratch = make_scratch(waves, programs, rows, torch.device("meta"))
        size = sum(tensor.numel() * tensor.element_size() for tensor in (scratch.maxima, scratch.listed))
        assert size == waves.programs * waves.program_bytes(rows)
        assert size <= SCRATCH_BYTES
        assert 1 <= waves.programs <= programs
        # At a million keys there is still a program for every multiprocessor.
        assert length > 2**20 or waves.programs >= min(programs, PROCESSORS)
        # Launches of many sizes are not compiled apart.
        assert waves.programs in (programs, waves.programs // 16 * 16)
