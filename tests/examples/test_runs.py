"""Every example runs to its end and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import required

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "byte_language_model": ["--steps", "1", "--windows", "1"],
    "digits": ["--steps", "1", "--seeds", "1"],
    "throughput": ["--steps", "1", "--longest", "1024", "--heads", "1", "--width", "16"],
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_writes_its_results(name, tmp_path):
    required.module("matplotlib")
    required.module("sklearn")
    command = [sys.executable, f"{name}.py", *SHORT[name], "--threads", "1", "--output", str(tmp_path)]
    result = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["versions"]["torch"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
