"""The Triton kernels of the additive recurrence compile for GPUs that this machine does not have, without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "width"), [(90, "bf16", 128), (80, "fp32", 64), (80, "fp16", 256)])
def test_kernels_compile_without_spills(arch: int, dtype: str, width: int) -> None:
    command = [sys.executable, "tools/recurrence_resources.py"]
    command += ["--arch", str(arch), "--dtype", dtype, "--width", str(width)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.count("kernel=") == 16
