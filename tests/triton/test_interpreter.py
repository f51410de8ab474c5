"""Runs tests/triton/kernels under Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from child_pytest import run_pytest

from sightline.ops.backends import INTERPRETS_TRITON

pytest.importorskip("triton")

MODULES = sorted(path.name for path in (Path(__file__).parent / "kernels").glob("test_*.py"))
TIME_LIMIT = 900

if INTERPRETS_TRITON:
    pytest.skip("this process is the interpreter's own", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT)
@pytest.mark.parametrize("name", MODULES)
def test_kernels_pass_under_the_interpreter(name: str) -> None:
    result = run_pytest(
        f"tests/triton/kernels/{name}",
        timeout=TIME_LIMIT,
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
