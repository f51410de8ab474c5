"""`sightline --version`, `--help`, `info`, and wrong commands."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import sightline as sl
from sightline import ops
from sightline.cli.progress import Progress


def test_version_is_the_packages_own(sightline):
    result = sightline("--version")
    assert result.returncode == 0
    assert result.stdout == f"sightline {sl.__version__}\n"


def test_help_names_every_command(sightline_here):
    result = sightline_here("--help")
    assert result.returncode == 0
    for name in ("info", "bench", "demo"):
        assert f"\n    {name} " in result.stdout


def test_help_of_bench_names_every_argument(sightline_here):
    result = sightline_here("bench", "--help")
    assert result.returncode == 0
    for name in ("--lengths", "--dtype", "--memory-limit", "--time-limit", "--text", "--output", "--quick"):
        assert name in result.stdout


def test_without_command_is_wrong_input(sightline_here):
    result = sightline_here()
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "COMMAND" in result.stderr


def test_info_as_json_agrees_with_the_library(sightline_here):
    result = sightline_here("info", "--json")
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert found["versions"]["sightline"] == sl.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["instruction_set"] == {"chosen": ops.isa_name(), "available": ops.available_isas()}
    assert found["backends"] == {
        name: {"available": available, "reason": reason} for name, (available, reason) in ops.backend_status().items()
    }
    assert set(found["backends"]) >= {"native", "triton", "reference"}


def test_info_gives_every_backend_a_reason(sightline_here):
    result = sightline_here("info")
    assert result.returncode == 0
    for name, (available, reason) in ops.backend_status().items():
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name] and reason in line)
        assert ("not available" in line) is not available


@pytest.mark.parametrize(
    "output",
    [
        "closed pipe",
        pytest.param("/dev/full", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")),
    ],
)
def test_output_that_nobody_takes_ends_without_a_traceback(output):
    command = [sys.executable, "-m", "sightline", "info"]
    if output == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    try:
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    assert result.returncode == 1
    said = "" if output == "closed pipe" else "sightline info: error: [Errno 28] No space left on device\n"
    assert result.stderr == said


def test_progress_without_stderr_is_silence(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress(1.0)
    progress.show("a row")
    progress.advance(1.0)
    progress.close()
