"""`sightline --version`, `--help`, `info`, and wrong commands."""

from __future__ import annotations

import json
import platform

import torch

import sightline as sl
from sightline import ops


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
