"""Every example runs to its end and writes what it says."""

from __future__ import annotations

import importlib
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


@pytest.mark.parametrize("name", SHORT)
def test_committed_results_are_those_of_the_plain_command(name, monkeypatch):
    """So that README's command, which has no arguments, gives what is committed."""
    required.module("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    try:
        example = importlib.import_module(name)
        defaults = vars(example.arguments_parser().parse_args([]))
    finally:
        for module in {name, "common"} - before:
            sys.modules.pop(module, None)
    del defaults["output"]
    document = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
    assert document["arguments"] == defaults
    assert (EXAMPLES / "results" / f"{name}.png").is_file()
    assert f"python examples/{name}.py " in (EXAMPLES / "README.md").read_text()
