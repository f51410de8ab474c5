"""The tests marked `isa`, run again under every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from child_pytest import run_pytest

from sightline import ops

HERE = Path(__file__).parent
TIME_LIMIT = 900  # the usual limit is too short on a machine that does much else
OTHERS = [isa for isa in ops.available_isas() if isa != ops.isa_name()]


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SIGHTLINE_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent.parent,
    )


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT)
@pytest.mark.parametrize("isa", OTHERS)
def test_kernels_pass_their_tests_under(isa: str) -> None:
    child = run_pytest("-m", "isa", "--tb=short", str(HERE), timeout=TIME_LIMIT, SIGHTLINE_ISA=isa)
    assert child.returncode == 0, child.stdout[-6000:]
    assert " passed" in child.stdout


def test_the_environment_chooses() -> None:
    """One of the machine's; the others are asked for in the tests of kernels above."""
    isa = ops.available_isas()[0]
    child = run_python(isa, "-c", "from sightline import ops; print(ops.isa_name())")
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused_by_name_when_a_kernel_is_called() -> None:
    code = "import torch, sightline as sl; q = torch.randn(1, 1, 2, 8); print('imported'); sl.attention(q, q, q)"
    child = run_python("sse9", "-c", code)
    assert child.returncode != 0
    assert child.stdout.strip() == "imported"
    message = child.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: SIGHTLINE_ISA: expected one of generic")
    assert message.endswith("got sse9")
