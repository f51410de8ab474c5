"""Runs tests/triton/kernels under Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sightline.ops.backends import INTERPRETS_TRITON

pytest.importorskip("triton")

MODULES = sorted(path.name for path in (Path(__file__).parent / "kernels").glob("test_*.py"))
TIME_LIMIT = 900

if INTERPRETS_TRITON:
    pytest.skip("this process is the interpreter's own", allow_module_level=True)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once: one interpreter uses one core."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A worker of xdist must not pass its identity on.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/triton/kernels/{name}"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in MODULES
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT)
@pytest.mark.parametrize("name", MODULES)
def test_kernels_pass_under_the_interpreter(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = processes[name].communicate(timeout=TIME_LIMIT)
    assert processes[name].returncode == 0, output[-20000:]
